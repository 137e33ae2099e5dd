"""Tests in processes that may die or be cut off, and the build beside them."""

import os
import sys
import time

import pytest
import torch

from benchmarks.measure import build, suite_plugin
from benchmarks.measure.build import Build
from benchmarks.measure.processes import start
from benchmarks.measure.suite import Suite, run_suite
from benchmarks.results.folder import Folder

# Tests that end in every way they can.
OUTCOMES = """
import os
import signal
import time

import pytest


@pytest.mark.parametrize("place", range(6))
def test_passes(place):
    pass


def test_fails():
    assert 1 + 1 == 3, "arithmetic"


def test_is_skipped():
    pytest.skip("not here")


def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_hangs():
    time.sleep(600)
"""


def run_outcomes(run, seconds, selected):
    """How each test of ``OUTCOMES`` ends, in two processes."""
    file = run.path / "test_outcomes.py"
    file.write_text(OUTCOMES)
    run_suite(Suite("trial", (str(file),), selected, 2), run, time.monotonic() + seconds)
    rows = suite_plugin.read(run.tests)
    return {name.rpartition("::")[2]: row["outcome"] for name, row in rows.items()}


def test_a_process_that_dies_takes_one_test_along(run):
    outcomes = run_outcomes(run, 100, "not hangs")
    assert outcomes.pop("test_fails") == outcomes.pop("test_dies") == "failed"
    assert outcomes.pop("test_is_skipped") == "skipped"
    assert outcomes == {f"test_passes[{place}]": "passed" for place in range(6)}
    text = (run.path / "failures.txt").read_text()
    assert "arithmetic" in text
    assert "its process ended with -9" in text
    assert len(run.failed) == 2
    assert not run.cut


@pytest.mark.slow
def test_tests_that_have_no_time_are_cut_and_no_failure(run):
    outcomes = run_outcomes(run, 20, "hangs or skipped")
    assert outcomes == {"test_hangs": "started", "test_is_skipped": "skipped"}
    assert run.cut == ["trial: 0 passed, 0 failed, 1 skipped, 1 cut, until no time was left"]
    assert not run.failed


def test_a_selection_of_no_test_is_a_failure(run):
    assert run_outcomes(run, 100, "no_such_test") == {}
    assert run.failed == ["trial"]


def test_outcomes_are_written_in_lines_and_the_last_one_counts(tmp_path):
    path = tmp_path / "tests.jsonl"
    for rows in (("a", "selected"),), (("a", "started"), ("b", "failed")):
        suite_plugin.write(path, [{"test": test, "outcome": outcome} for test, outcome in rows])
    with path.open("a") as file:
        file.write('{"test": "b", "outc')  # a full disk
    found = suite_plugin.read(path)
    assert {name: row["outcome"] for name, row in found.items()} == {"a": "started", "b": "failed"}
    assert suite_plugin.told(found) == "0 passed, 1 failed, 0 skipped, 1 cut"


def test_the_build_is_for_this_gpu_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(build, "start", lambda command, env, log: seen.append(env))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0 10.0+PTX")  # as images set it
    Build(Folder(tmp_path / "results", "cuda"))
    assert seen[0]["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_a_build_that_is_cut_or_fails_says_so(run, monkeypatch):
    for code, status in (("import time; time.sleep(99)", "cut"), ("1 / 0", "failed")):
        made = Build.__new__(Build)
        made.folder, made.started, made.built = run, time.monotonic(), run.path
        made.log = run.log(status)
        made.process = start([sys.executable, "-c", code], dict(os.environ), made.log)
        made.finish(time.monotonic() + (0.2 if status == "cut" else 30))
        assert run.noted["build"]["status"] == status
        assert run.noted["build"]["reason"]
    assert run.failed == ["build"]
    assert len(run.cut) == 1
    assert "ZeroDivisionError" in (run.path / "failures.txt").read_text()

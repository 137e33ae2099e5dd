"""The GPU benchmark, rehearsed without one: its flow, its limits and its way with failures."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_plugin, gpu_speed, gpu_suite
from benchmarks.gpu_providers import CANDIDATES, find
from benchmarks.gpu_record import COLUMNS, Record, slug
from benchmarks.gpu_report import draw_figures, write_summary
from benchmarks.gpu_speed import SHAPES, Family, fit_to, measure_all
from benchmarks.gpu_suite import read_outcome, run_suite, start
from benchmarks.gpu_worker import Job
from benchmarks.shapes import Shape, expected_entries, text_like

ROOT = Path(__file__).parents[2]
TINY = Shape(8, 16, 64)
# Providers that fail in every way they can.
OWN = """
import os
import time

import torch


def wrong(problem):
    return problem.hidden.sum()


def raises(problem):
    raise ValueError("no such luck")


def too_large(problem):
    raise torch.OutOfMemoryError("tried to allocate 999 GiB")


def dies(problem):
    os.abort()


def hangs(problem):
    time.sleep(600)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of processes that find the module ``own``."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return gpu._environment(dry_run=True)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path / "results", "cpu")
    record.open()
    return record


# What a machine with a GPU may lack; no process of a run may import them.
BLOCKED = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""
ABSENT = (
    *("tyro", "rich", "accelerate", "hypothesis", "ninja", "pybind11", "matplotlib", "peft"),
    *("transformers", "datasets", "pandas", "jinja2", "yaml", "xdist", "pytest_benchmark", "scipy"),
)


def bare_environment(folder: Path) -> dict[str, str]:
    """Of processes in which none of ``ABSENT`` can be imported, whatever starts them."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKED.format(names=ABSENT))
    path = os.pathsep.join([str(folder), str(ROOT)])
    # Plugins of pytest that are installed would be imported by their entry points.
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def start_bare(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--output", "results"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=tmp_path,
        env=bare_environment(tmp_path / "bare"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_dry_run_needs_torch_triton_numpy_and_pytest_alone(tmp_path: Path) -> None:
    process = start_bare(tmp_path, "--providers", "bft triton sampled 2^-12", "quack")
    text, _ = process.communicate()
    folder = tmp_path / "results"
    assert process.returncode == 0, text
    assert "no figures: matplotlib is not installed" in text
    peer, ours = rows_of(folder)
    assert (peer["status"], ours["status"]) == ("unavailable", "ok")
    assert peer["reason"]
    assert peer["commit"] == ours["commit"]
    assert ours["entries_per_token"]
    assert ours["listed_per_token"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["nvidia_smi"]
    assert environment["build"]["status"] == "ok"
    outcomes = gpu_plugin.read(folder / "tests.jsonl")
    assert {row["outcome"] for row in outcomes.values()} <= {"passed", "skipped"}
    order = [name.partition("[")[0].partition("::")[2] for name in outcomes]
    graph = order.index("test_a_graph_replays_what_the_inputs_have_become")
    assert graph < order.index("test_the_hash_has_the_bits_of_the_definition")
    assert order.index("test_ties_go_to_the_lowest_index") > graph
    summary = (folder / "summary.md").read_text()
    assert "bft triton sampled 2^-12" in summary
    assert f"{read_outcome(folder / 'tests.jsonl').text};" in summary


@pytest.mark.slow
@pytest.mark.parametrize("when", [8.0, 20.0])
def test_what_a_kill_leaves_can_be_read(tmp_path: Path, when: float) -> None:
    process = start_bare(tmp_path, "--providers", "eager")
    time.sleep(when * random.uniform(0.7, 1.3))
    assert process.poll() is None
    process.kill()
    process.communicate()
    folder = tmp_path / "results"
    if (folder / "environment.json").exists():
        assert json.loads((folder / "environment.json").read_text())["torch"]
    lines = (folder / "tests.jsonl").read_text() if (folder / "tests.jsonl").exists() else ""
    assert not lines or lines.endswith("\n")
    assert all(json.loads(line)["test"] for line in lines.splitlines())
    if (folder / "loss.csv").exists():
        assert all(row["status"] for row in rows_of(folder))
    if (folder / "summary.md").exists():
        assert "## Failures\n\nNone." in (folder / "summary.md").read_text()


@pytest.mark.slow
def test_a_failure_is_written_down_and_the_others_go_on(own, record: Record) -> None:
    failing = ["own:wrong", "own:raises", "own:too_large", "own:dies"]
    names = ["bft torch exact", *failing, "eager"]
    shapes = [TINY, Shape(8, 16, 65), Shape(8, 16, 66)]
    measure_all(record, own, time.monotonic() + 120, shapes, names, turns=1)
    assert {(row["provider"], row["status"]) for row in rows_of(record.folder)} == {
        ("bft torch exact", "ok"),
        ("own:wrong", "wrong"),
        ("own:raises", "failed"),
        ("own:too_large", "out of memory"),
        ("own:dies", "failed"),
        ("eager", "ok"),
    }
    assert len(record.rows) == len(names) * len(shapes)
    dead = [row["reason"] for row in record.rows if row["provider"] == "own:dies"]
    assert dead[:2] == ["its process ended with -6"] * 2
    assert dead[2] == "it took its process down 2 times before"
    text = (record.folder / "failures.txt").read_text()
    assert "ValueError: no such luck" in text
    assert "Fatal Python error: Aborted" in text
    assert "error_hidden is" in text
    # That a peer has no room is a result.
    assert len(record.failed) == 3 * 3
    write_summary(record)
    assert (
        "own:raises: failed: ValueError: no such luck" in (record.folder / "summary.md").read_text()
    )


@pytest.mark.slow
def test_what_takes_too_long_is_cut(own, record: Record) -> None:
    started = time.monotonic()
    names = ["own:hangs", "eager"]
    measure_all(record, own, started + 40, [TINY, Shape(8, 16, 65)], names, turns=1)
    assert time.monotonic() - started < 42
    rows = [(row["provider"], row["status"], row["reason"]) for row in record.rows]
    assert rows[0][:2] == ("own:hangs", "cut")
    assert rows[0][2].startswith("not done after ")
    assert rows[1] == ("own:hangs", "cut", "no time was left to start it")
    assert [row[:2] for row in rows[2:]] == [("eager", "ok")] * 2


@pytest.mark.slow
def test_what_is_too_slow_twice_is_cut_on_other_shapes(own, record: Record) -> None:
    jobs = [Job("own:hangs", Shape(8, 16, 64 + place)) for place in range(4)]
    family = Family(jobs, time.monotonic() + 60, 2.0, {})
    rows = [row for _, row in gpu_speed._measure(family, record, own, 1)]
    assert [row["status"] for row in rows] == ["cut"] * 4
    assert rows[-1]["reason"] == "it was not done in time 2 times before"


def test_without_time_every_row_is_cut(record: Record) -> None:
    measure_all(record, {}, time.monotonic(), [TINY], ["eager", "trl"], turns=1)
    assert {row["status"] for row in record.rows} <= {"cut", "unavailable"}
    assert len(record.rows) == 2
    assert record.cut
    assert not record.failed


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


def run_outcomes(record: Record, seconds: float, selected: str) -> dict[str, str]:
    """How each test of ``OUTCOMES`` ends, in two processes."""
    file = record.folder / "test_outcomes.py"
    file.write_text(OUTCOMES)
    env = gpu._environment(dry_run=True)
    run_suite(record, env, time.monotonic() + seconds, "trial", (str(file),), selected, 2)
    rows = gpu_plugin.read(record.tests)
    return {name.rpartition("::")[2]: row["outcome"] for name, row in rows.items()}


def test_a_process_that_dies_takes_one_test_along(record: Record) -> None:
    outcomes = run_outcomes(record, 100, "not hangs")
    assert outcomes.pop("test_fails") == outcomes.pop("test_dies") == "failed"
    assert outcomes.pop("test_is_skipped") == "skipped"
    assert outcomes == {f"test_passes[{place}]": "passed" for place in range(6)}
    text = (record.folder / "failures.txt").read_text()
    assert "arithmetic" in text
    assert "its process ended with -9" in text
    assert len(record.failed) == 2
    assert not record.cut


@pytest.mark.slow
def test_tests_that_have_no_time_are_cut_and_no_failure(record: Record) -> None:
    outcomes = run_outcomes(record, 20, "hangs or skipped")
    assert outcomes == {"test_hangs": "started", "test_is_skipped": "skipped"}
    assert record.cut == ["trial: 0 passed, 0 failed, 1 skipped, 1 cut, until no time was left"]
    assert not record.failed


def test_a_selection_of_no_test_is_a_failure(record: Record) -> None:
    assert run_outcomes(record, 100, "no_such_test") == {}
    assert record.failed == ["trial"]


def test_outcomes_are_written_in_lines_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    gpu_plugin.write(path, [{"test": "a", "outcome": "selected"}])
    gpu_plugin.write(
        path, [{"test": "a", "outcome": "started"}, {"test": "b", "outcome": "failed"}]
    )
    with path.open("a") as file:
        file.write('{"test": "b", "outc')  # a full disk
    assert {name: row["outcome"] for name, row in gpu_plugin.read(path).items()} == {
        "a": "started",
        "b": "failed",
    }
    assert read_outcome(path).text == "0 passed, 1 failed, 0 skipped, 1 cut"


def test_earlier_results_stay(tmp_path: Path) -> None:
    folders = []
    for _ in range(3):
        record = Record(tmp_path / "gpu", "cpu")
        record.open()
        record.note(run=len(folders))
        folders.append(record.folder.name)
    assert folders == ["gpu", "gpu-2", "gpu-3"]
    for number, name in enumerate(folders):
        assert json.loads((tmp_path / name / "environment.json").read_text()) == {"run": number}


def test_the_build_is_for_this_gpu_alone(tmp_path: Path, monkeypatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(gpu_suite, "start", lambda command, env, log: seen.append(env))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    record = Record(tmp_path / "results", "cuda")
    record.open()
    gpu.Build(record, {"TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0 10.0+PTX"})  # as images set it
    assert seen[0]["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_what_the_backends_say_comes_from_another_process(record: Record) -> None:
    record.look(gpu._environment(dry_run=True))
    assert record.noted["bft_kernels"]["backends"]["torch"]["cpu"] == []
    record.look({"PATH": "", "PYTHONHOME": "/nowhere"})  # as one that dies
    assert record.failed == ["info"]
    assert record.noted["bft_kernels"] == {}


def test_a_build_that_is_cut_or_fails_says_so(record: Record, monkeypatch) -> None:
    for code, status in (("import time; time.sleep(99)", "cut"), ("1 / 0", "failed")):
        build = gpu.Build.__new__(gpu.Build)
        build.record, build.started, build.name = record, time.monotonic(), "cpu"
        build.log = record.log(status)
        build.process = start([sys.executable, "-c", code], dict(os.environ), build.log)
        reason = build.finish(time.monotonic() + (0.2 if status == "cut" else 30))
        assert record.noted["build"]["status"] == status
        assert reason
    assert record.failed == ["build"]
    assert len(record.cut) == 1
    assert "ZeroDivisionError" in (record.folder / "failures.txt").read_text()


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("this part is broken")

    monkeypatch.setattr(gpu, "compile_ahead", broken)
    config = gpu.Config(dry_run=True, output=tmp_path, providers=("quack",), tests=False)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(config)
    assert exit_.value.code == 1
    assert "this part is broken" in (tmp_path / "failures.txt").read_text()
    assert rows_of(tmp_path)[0]["status"] == "unavailable"
    assert "- figures" in (tmp_path / "summary.md").read_text()  # there was nothing to draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"found no GPU that torch can use .*--dry-run"):
        gpu.main(gpu.Config(output=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "output: got none"), ({"providers": ("eager", "egaer")}, "providers: got 'egaer'")],
)
def test_refuses_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    if settings:
        settings["output"] = tmp_path / "results"
    with pytest.raises(SystemExit, match=message):
        gpu.main(gpu.Config(dry_run=True, **settings))
    assert not (tmp_path / "results").exists()


def test_shapes_are_halved_until_there_is_room() -> None:
    assert fit_to(SHAPES[0], 80 * 2**30) == SHAPES[0]
    small = fit_to(SHAPES[0], 5 * 2**30)
    assert small == Shape(4096, 4096, 65_536)
    assert fit_to(SHAPES[0], 0).tokens >= 512


def test_inputs_keep_as_many_entries_as_text() -> None:
    problem = text_like(Shape(512, 64, 151_936), torch.bfloat16, "cpu")
    for eps, expected in ((2**-12, 335), (2**-10, 133), (2**-8, 50)):
        assert 0.7 * expected < expected_entries(problem, eps, rows=512) < 1.4 * expected
    with torch.no_grad():
        logits = problem.hidden.float() @ problem.weight.float().T
    confidence = logits.softmax(1).gather(1, problem.target[:, None])
    assert 0.3 < confidence.mean() < 0.7
    assert 0.2 < (confidence > 0.9).float().mean() < 0.6


def test_names() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names)
    assert find("own:wrong").family == "own:wrong"


def test_figures_and_summary_of_several_shapes(record: Record) -> None:
    for place, shape in enumerate(SHAPES):
        for index, candidate in enumerate(CANDIDATES):
            taken = (1 + index) * 0.02
            where = {
                "tokens": shape.tokens,
                "width": shape.width,
                "vocabulary": shape.vocabulary,
                "scaled_down_from": "16384 x 262144" if place == 1 else "",
                "dtype": "bfloat16",
            }
            timed = {
                "status": "ok",
                "seconds": taken,
                "bare_seconds": 0.02,
                "times_g": taken / 0.02,
                "tokens_per_second": shape.tokens / taken,
                "extra_bytes": 10 ** (6 + index % 4),
                "error_hidden": 0.01,
            }
            if index == 3:
                timed = {"status": "cut", "reason": "not done after 20 s"}
            named = {"provider": candidate.name, "family": candidate.family}
            record.rows.append(dict.fromkeys(COLUMNS, "") | named | where | timed)
    draw_figures(record)
    write_summary(record)
    text = (record.folder / "summary.md").read_text()
    assert "Scaled down from 16384 x 262144" in text
    assert "1G is 20.00 ms" in text
    assert text.count("cut: not done after 20 s") == len(SHAPES)
    assert (record.folder / "loss.png").stat().st_size > 0

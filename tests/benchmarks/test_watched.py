"""What is measured within a time limit may fail, hang or die, and the others go on."""

import time

import pytest
import torch

from benchmarks.measure import watched
from benchmarks.measure.watched import Family, fit, measure_all
from benchmarks.measure.worker import Job
from benchmarks.providers.registry import Case, telling_cases
from benchmarks.results.schema import read
from benchmarks.results.summary import write_summary
from benchmarks.shapes import ON_A_GPU, Shape, expected_entries, text_like

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
def own(tmp_path, monkeypatch):
    """Processes find the module ``own``."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
def test_a_failure_is_written_down_and_the_others_go_on(own, run):
    failing = ["own:wrong", "own:raises", "own:too_large", "own:dies"]
    names = ["bft torch sampled", *failing, "eager"]
    cases = [one for one in telling_cases(names) if one.mode == "both"]
    shapes = [TINY, Shape(8, 16, 65), Shape(8, 16, 66)]
    measure_all(run, time.monotonic() + 120, shapes, cases, turns=1)
    told = dict(zip(names, ("ok", "wrong", "failed", "out of memory", "failed", "ok"), strict=True))
    rows = read(run.path / "loss.csv")
    assert {(row["provider"], row["status"]) for row in rows} == set(told.items())
    assert len(run.rows) == len(names) * len(shapes)
    dead = [row["reason"] for row in run.rows if row["provider"] == "own:dies"]
    assert dead[:2] == ["its process ended with -6"] * 2
    assert dead[2] == "it took its process down 2 times before"
    text = (run.path / "failures.txt").read_text()
    assert "ValueError: no such luck" in text
    assert "Fatal Python error: Aborted" in text
    assert "error_hidden is" in text
    # That a peer has no room is a result.
    assert len(run.failed) == 3 * 3
    write_summary(run)
    summary = (run.path / "summary.md").read_text()
    assert "failed: own:raises (plain both): ValueError: no such luck" in summary


@pytest.mark.slow
def test_what_takes_too_long_is_cut(own, run):
    started = time.monotonic()
    names = ["own:hangs", "eager"]
    measure_all(run, started + 40, [TINY, Shape(8, 16, 65)], telling_cases(names), turns=1)
    assert time.monotonic() - started < 42
    rows = [(row["provider"], row["status"], row["reason"]) for row in run.rows]
    assert rows[0][:2] == ("own:hangs", "cut")
    assert rows[0][2].startswith("not done after ")
    assert rows[1] == ("own:hangs", "cut", "no time was left to start it")
    assert [row[:2] for row in rows[2:]] == [("eager", "ok")] * 2


@pytest.mark.slow
def test_what_is_too_slow_twice_is_cut_on_other_shapes(own, run):
    jobs = [Job(Case("own:hangs"), Shape(8, 16, 64 + place)) for place in range(4)]
    family = Family(jobs, time.monotonic() + 60, 2.0)
    rows = [row for _, row in watched._measure(family, run, 1)]
    assert [row["status"] for row in rows] == ["cut"] * 4
    assert rows[-1]["reason"] == "it was not done in time 2 times before"


def test_without_time_every_row_is_cut(run):
    measure_all(run, time.monotonic(), [TINY], telling_cases(["eager", "trl"]), turns=1)
    assert {row["status"] for row in run.rows} <= {"cut", "unavailable"}
    assert len(run.rows) == 2
    assert run.cut
    assert not run.failed


def test_shapes_are_halved_until_there_is_room():
    assert fit(ON_A_GPU[0], 80 * 2**30) == ON_A_GPU[0]
    small = fit(ON_A_GPU[0], 5 * 2**30)
    assert small == Shape(4096, 4096, 65_536)
    assert fit(ON_A_GPU[0], 0).tokens >= 512


def test_inputs_keep_as_many_entries_as_text():
    problem = text_like(Shape(512, 64, 151_936), torch.bfloat16, "cpu")
    for eps, expected in ((2**-12, 335), (2**-10, 133), (2**-8, 50)):
        assert 0.7 * expected < expected_entries(problem, eps, rows=512) < 1.4 * expected
    with torch.no_grad():
        logits = problem.hidden.float() @ problem.weight.float().T
    confidence = logits.softmax(1).gather(1, problem.target[:, None])
    assert 0.3 < confidence.mean() < 0.7
    assert 0.2 < (confidence > 0.9).float().mean() < 0.6

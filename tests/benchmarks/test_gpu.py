"""The GPU benchmark, rehearsed without one: its flow, its limits and its way with failures."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_inputs import SHAPES, fit_to
from benchmarks.gpu_providers import CANDIDATES, find, why_missing
from benchmarks.gpu_record import COLUMNS, Record, slug
from benchmarks.gpu_report import draw_figures, write_summary
from benchmarks.gpu_speed import measure_all
from benchmarks.gpu_suite import read_junit, run_suite
from benchmarks.shapes import Shape, expected_entries, text_like

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
    record.clear()
    return record


@pytest.mark.slow
def test_a_dry_run_does_everything(tmp_path: Path) -> None:
    (tmp_path / "failures.txt").write_text("of an earlier run")
    gpu.main(gpu.Config(dry_run=True, output=tmp_path))
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows if row["status"] == "ok"] == [
        c.name for c in CANDIDATES if not why_missing(c, "cpu")
    ]
    assert {row["provider"] for row in rows} == {c.name for c in CANDIDATES}
    assert all(row["reason"] for row in rows if row["status"] == "unavailable")
    for row in rows:
        assert row["commit"] == rows[0]["commit"]
        sampled = "sampled" in row["provider"] and row["status"] == "ok"
        assert bool(row["entries_per_token"]) == bool(row["listed_per_token"]) == sampled
    assert read_junit(tmp_path / "junit.xml").failed == 0
    assert json.loads((tmp_path / "environment.json").read_text())["nvidia_smi"]
    summary = (tmp_path / "summary.md").read_text()
    assert "bft triton sampled 2^-12" in summary
    assert "3 passed, 0 failed" in summary
    for name in ("loss.png", "loss.svg", "log.txt"):
        assert (tmp_path / name).stat().st_size > 0
    assert not (tmp_path / "failures.txt").exists()


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


def test_without_time_every_row_is_cut(record: Record) -> None:
    measure_all(record, {}, time.monotonic(), [TINY], ["eager", "trl"], turns=1)
    assert {row["status"] for row in record.rows} <= {"cut", "unavailable"}
    assert len(record.rows) == 2


def test_a_test_run_that_is_cut_or_selects_nothing_is_a_failure(record: Record) -> None:
    env = gpu._environment(dry_run=True)
    run_suite(record, env, 0.5)
    assert record.failed == ["tests"]
    run_suite(record, env, 100, "no_such_test")
    assert record.failed == ["tests"] * 2
    text = (record.folder / "failures.txt").read_text()
    assert "cut after 0 s" in text
    assert "pytest ended with 5" in text


def test_failing_tests_are_read_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4" '
        'time="2.5"><testcase classname="a" name="b"/><testcase classname="a" name="c"><failure '
        'message="off by 1">trace</failure></testcase><testcase classname="a" name="d"><error '
        'message="no GPU"/></testcase><testcase classname="a" name="e"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    outcome = read_junit(report)
    assert outcome.text == "1 passed, 2 failed, 1 skipped in 2 s"
    assert outcome.details == ("a::c\noff by 1\ntrace", "a::d\nno GPU\n")


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("this part is broken")

    monkeypatch.setattr(gpu, "run_suite", broken)
    config = gpu.Config(dry_run=True, output=tmp_path, providers=("quack",))
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
    assert (record.folder / "loss.svg").stat().st_size > 0

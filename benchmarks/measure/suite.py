"""Runs tests on a device, divided among processes that may die or be cut off."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import suite_plugin
from benchmarks.measure.processes import kill_group, start, tail
from benchmarks.results.folder import Folder

# One step, capture in a graph, synchronisation and the hash, in this order.
FIRST = ("tests/gpu/test_first_steps.py",)
VALUES = (
    "tests/kernels/test_fused.py",
    "tests/kernels/test_gpu_backends.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_gpu_weighting.py",
)
# A process that dies is started again for the rest of its share, at most so many times in all.
_STARTS = 4
_POLL = 0.1
_SUMMARY = 5.0  # seconds between two summaries


@dataclass(frozen=True)
class Suite:
    """Some tests, and the number of processes that run them."""

    title: str
    files: tuple[str, ...]
    selected: str  # an expression of pytest -k
    processes: int


def run_suite(suite: Suite, folder: Folder, until: float) -> None:
    """Runs pytest, at most until a time; ``tests.jsonl`` says how each test ended."""
    folder.say(f"{suite.title}, for up to {max(0.0, until - time.monotonic()):.0f} s")
    known, shown = suite_plugin.read(folder.tests), time.monotonic()
    shares = [_run_share(suite, folder, place) for place in range(suite.processes)]
    running = shares
    try:
        while running and time.monotonic() < until:
            running = [share for share in running if next(share, False)]
            time.sleep(_POLL)
            if time.monotonic() > shown + _SUMMARY:
                _report(folder)
                folder.summarize(folder)
                shown = time.monotonic()
    finally:
        for share in shares:
            share.close()
    _report(folder)
    ours = {name: row for name, row in suite_plugin.read(folder.tests).items() if name not in known}
    told = suite_plugin.told(ours)
    folder.say(f"{suite.title}: {told}")
    if running or suite_plugin.count_cut(ours):
        why = "until no time was left" if running else "until its processes died too often"
        folder.cut.append(f"{suite.title}: {told}, {why}")
    elif not ours and suite.title not in folder.failed:
        folder.failure(suite.title, f"no test was selected\n{tail(_log(suite, folder, 0))}")


def _report(folder: Folder) -> None:
    """Writes down the failures that are new."""
    for name, row in suite_plugin.read(folder.tests).items():
        if row["outcome"] == "failed" and name not in folder.failed:
            folder.failure(name, row["detail"])


def _log(suite: Suite, folder: Folder, place: int) -> Path:
    return folder.log(f"{suite.title}-{place}".replace(" ", "-"))


def _run_share(suite: Suite, folder: Folder, place: int) -> Generator[bool, None, None]:
    """Runs some of the tests in a process, and the rest in another one if it dies; until closed.

    Yields while tests run.
    """
    log = _log(suite, folder, place)
    command = [sys.executable, "-m", "pytest", *suite.files, "-k", suite.selected, "-v"]
    command += ["--color=no", "-p", "no:cacheprovider", "-p", suite_plugin.__name__]
    command += ["--continue-on-collection-errors"]
    env = folder.env | {
        suite_plugin.OUTCOMES: str(folder.tests.resolve()),
        suite_plugin.SHARE: f"{place}/{suite.processes}",
        suite_plugin.PARENT: str(os.getpid()),
    }
    for _ in range(_STARTS):
        process = start(command, env, log)
        try:
            while (code := process.poll()) is None:
                yield True
        finally:
            kill_group(process)
        if code in (0, 1, 5):  # passed, failed, none selected
            return
        detail = f"ended with {code}\n{tail(log)}"
        rows = [
            {"test": name, "outcome": "failed", "detail": f"its process {detail}"}
            for name, row in suite_plugin.read(folder.tests).items()
            if row["outcome"] == "started" and suite_plugin.place_of(name, suite.processes) == place
        ]
        suite_plugin.write(folder.tests, rows)
        if code > 0 and code != suite_plugin.DEVICE_LOST:  # it did not die
            break
    if not rows and suite.title not in folder.failed:
        folder.failure(suite.title, f"pytest {detail}")

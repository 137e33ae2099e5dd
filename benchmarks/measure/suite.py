"""Tests on a device, shared out to processes that may die or be cut off."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.measure import suite_plugin
from benchmarks.measure.processes import kill_group, start, tail
from benchmarks.results.folder import Folder

# One step, capture, synchronisation and the hash, in this order.
FIRST = ("tests/gpu/test_first_steps.py",)
VALUES = (
    "tests/kernels/test_fused.py",
    "tests/kernels/test_gpu_backends.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_gpu_weights.py",
)
# A process that dies is started again for the rest of its share, but not for ever.
_STARTS = 4
_POLL = 0.1
_SUMMARY = 5.0  # seconds between two summaries


@dataclass(frozen=True)
class Suite:
    """Some tests, and in how many processes they run."""

    title: str
    files: tuple[str, ...]
    selected: str  # as by pytest -k
    processes: int


def run_suite(suite: Suite, folder: Folder, env: dict[str, str], until: float) -> None:
    """Runs pytest until a time; ``tests.jsonl`` says how each test ended."""
    folder.say(f"{suite.title}, for up to {max(0.0, until - time.monotonic()):.0f} s")
    shares = [_Share(suite, folder, env, place) for place in range(suite.processes)]
    known, shown = set(suite_plugin.read(folder.tests)), time.monotonic()
    reported: set[str] = set(known)
    running = list(shares)
    try:
        while running and time.monotonic() < until:
            running = [share for share in running if share.goes_on()]
            time.sleep(_POLL)
            if time.monotonic() > shown + _SUMMARY:
                _report(folder, reported)
                folder.summarize(folder)
                shown = time.monotonic()
    finally:
        for share in shares:
            kill_group(share.process)
    _report(folder, reported)
    ours = {name: row for name, row in suite_plugin.read(folder.tests).items() if name not in known}
    told = suite_plugin.told(ours)
    folder.say(f"{suite.title}: {told}")
    if running or suite_plugin.count_cut(ours):
        why = "until no time was left" if running else "until its processes died too often"
        folder.cut.append(f"{suite.title}: {told}, {why}")
    elif not ours and suite.title not in folder.failed:
        folder.failure(suite.title, f"no test was selected\n{tail(shares[0].log)}")


def _report(folder: Folder, reported: set[str]) -> None:
    """Writes down the failures that are new."""
    for name, row in suite_plugin.read(folder.tests).items():
        if row["outcome"] == "failed" and name not in reported:
            reported.add(name)
            folder.failure(name, row["detail"])


class _Share:
    """Some of the tests, in one process at a time."""

    def __init__(self, suite: Suite, folder: Folder, env: Mapping[str, str], place: int) -> None:
        self.suite, self.folder, self.place = suite, folder, place
        self.log = folder.log(f"{suite.title}-{place}".replace(" ", "-"))
        self.command = [sys.executable, "-m", "pytest", *suite.files, "-k", suite.selected, "-v"]
        self.command += ["--color=no", "-p", "no:cacheprovider", "-p", suite_plugin.__name__]
        self.command += ["--continue-on-collection-errors"]
        self.env = dict(env) | {
            suite_plugin.OUTCOMES: str(folder.tests.resolve()),
            suite_plugin.SHARE: f"{place}/{suite.processes}",
            suite_plugin.PARENT: str(os.getpid()),
        }
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process = start(self.command, self.env, self.log)

    def goes_on(self) -> bool:
        """Whether tests of it still run; starts another process where one died."""
        code = self.process.poll()
        if code is None:
            return True
        if code in (0, 1, 5):  # passed, failed, none selected
            return False
        running = [
            name
            for name, row in suite_plugin.read(self.folder.tests).items()
            if row["outcome"] == "started"
            and suite_plugin.place_of(name, self.suite.processes) == self.place
        ]
        detail = f"its process ended with {code}\n{tail(self.log)}"
        rows = [{"test": name, "outcome": "failed", "detail": detail} for name in running]
        suite_plugin.write(self.folder.tests, rows)
        died = code < 0 or code == suite_plugin.DEVICE_LOST
        if died and self.starts < _STARTS:
            self.start()
            return True
        title = self.suite.title
        if not rows and title not in self.folder.failed:
            self.folder.failure(title, f"pytest ended with {code}\n{tail(self.log)}")
        return False

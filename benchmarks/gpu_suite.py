"""The correctness tests on the device, in a process with a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_record import Record

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/kernels/test_fused.py",
    "tests/kernels/test_gpu_backends.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_weights.py",
    "tests/kernels/test_sampling_native.py",
)
# What tests a device among the tests of these files.
SELECTED = "triton or cuda and not spill"
REHEARSED = "(triton or cuda) and ties_go or test_cuda_equals"
# Compiling kernels is most of the time, and goes on beside the GPU.
PROCESSES = 8
# Seconds for pytest to write its report when it is interrupted.
_GRACE = 10.0


@dataclass(frozen=True)
class Outcome:
    """What a junit.xml says."""

    tests: int
    failed: int
    skipped: int
    seconds: float
    details: tuple[str, ...]  # of each failure

    @property
    def text(self) -> str:
        passed = self.tests - self.failed - self.skipped
        counts = f"{passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{counts} in {self.seconds:.0f} s"


def run_suite(record: Record, env: dict[str, str], limit: float, selected: str = SELECTED) -> None:
    """Runs pytest, cut off after ``limit`` seconds; writes junit.xml and what failed."""
    report = record.folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", *FILES, "-k", selected, "-v", "--color=no"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report.resolve()}"]
    processes = min(PROCESSES, (os.cpu_count() or 1) // 2)
    if record.device == "cuda" and processes > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    before = record.log.stat().st_size if record.log.exists() else 0
    record.say(f"tests, for up to {limit:.0f} s")
    code = run_limited(command, env, record.log, limit)
    outcome = read_junit(report) if report.exists() else None
    record.say(f"tests: {outcome.text if outcome else 'no report'}")
    for detail in outcome.details if outcome else ():
        record.failure("tests", detail)
    if code is None:
        done = outcome.text if outcome else "pytest wrote no report"
        record.failure("tests", f"cut after {limit:.0f} s; so far: {done}")
    elif code != 0 and not (outcome and outcome.details):
        record.failure("tests", f"pytest ended with {code}\n{tail(record.log, before)}")


def run_limited(command: list[str], env: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit status; None if it took too long, and was interrupted and then killed."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + _GRACE
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        return None
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_junit(path: Path) -> Outcome:
    """Counts, and the text of each failure."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))

    def total(name: str) -> float:
        return sum(float(suite.get(name, 0)) for suite in suites)

    details = []
    for suite in suites:
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                for found in case.iter(kind):
                    name = f"{case.get('classname')}::{case.get('name')}"
                    details.append(f"{name}\n{found.get('message', '')}\n{found.text or ''}")
    return Outcome(
        tests=int(total("tests")),
        failed=int(total("failures") + total("errors")),
        skipped=int(total("skipped")),
        seconds=total("time"),
        details=tuple(details),
    )


def tail(log: Path, start: int, characters: int = 6000) -> str:
    """The end of what a log has from a place on."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-characters:]

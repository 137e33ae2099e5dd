"""What runs beside ``python -m benchmarks gpu``: the build, and the tests on the device."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import suite_plugin
from benchmarks.results.folder import Record

ROOT = Path(__file__).parents[2]
# One step, capture, synchronisation and the hash, in this order.
FIRST = ("tests/gpu/test_first_steps.py",)
VALUES = (
    "tests/kernels/test_fused.py",
    "tests/kernels/test_gpu_backends.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_weights.py",
)
# A process that dies is started again for the rest of its share, but not for ever.
_STARTS = 4
_POLL = 0.1
_SUMMARY = 5.0  # seconds between two summaries


@dataclass(frozen=True)
class Outcome:
    """How many tests ended how."""

    counts: Counter[str]

    @property
    def text(self) -> str:
        ended = ", ".join(f"{self.counts[how]} {how}" for how in ("passed", "failed", "skipped"))
        cut = self.counts["selected"] + self.counts["started"]
        return ended + (f", {cut} cut" if cut else "")


def read_outcome(path: Path) -> Outcome:
    """Of a file of :mod:`benchmarks.measure.suite_plugin`."""
    return Outcome(Counter(row["outcome"] for row in suite_plugin.read(path).values()))


class Build:
    """Compiles the extension beside everything else.

    On a GPU ``bft_kernels._cuda`` for that GPU alone; it replaces an older one when it is whole. A
    rehearsal compiles ``_cpu``, and leaves it where it was built.
    """

    def __init__(self, record: Record, env: dict[str, str]) -> None:
        self.record, self.started = record, time.monotonic()
        self.name = "cuda" if record.device == "cuda" else "cpu"
        self.folder = ROOT / "build" / f"gpu-{record.device}"
        settings = {"BFT_BUILD": self.name}
        if record.device == "cuda":  # images set the variable, for every GPU
            settings["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(0))
        elif record.device == "cpu":
            settings["CXXFLAGS"] = "-O0"
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(self.folder)]
        command += ["--build-lib", str(self.folder / "lib")]
        self.log = record.log("build")
        self.process = start(command, env | settings, self.log)

    def finish(self, until: float) -> str:
        """Waits; why there is no module of this build, empty if there is one."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
            status, reason = ("ok", "") if code == 0 else ("failed", tail(self.log))
        except subprocess.TimeoutExpired:
            limit = time.monotonic() - self.started
            status, reason = "cut", f"the build was not done after {limit:.0f} s"
        finally:
            kill_group(self.process)
        if "no nvcc" in reason:
            status = "unavailable"
        seconds = round(time.monotonic() - self.started, 1)
        self.record.note(build={"module": self.name, "status": status, "seconds": seconds})
        self.record.say(f"build of _{self.name}: {status}")
        if status == "failed":
            self.record.failure("build", reason)
        elif status == "cut":
            self.record.cut.append(f"build: {reason}")
        if status in ("ok", "failed") and self.record.device == "cuda":
            self._install()  # it comes first: _cpu, after it, may be what failed
        return reason

    def _install(self) -> None:
        for built in self.folder.glob("lib/bft_kernels/_cuda*.so"):
            target = ROOT / "bft_kernels" / built.name
            shutil.copy2(built, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)
        importlib.invalidate_caches()


def run_suite(
    record: Record,
    env: dict[str, str],
    until: float,
    title: str,
    files: tuple[str, ...],
    selected: str,
    processes: int,
) -> None:
    """Runs pytest in several processes until a time; ``tests.jsonl`` says how each test ended."""
    record.say(f"{title}, for up to {max(0.0, until - time.monotonic()):.0f} s")
    shares = [
        _Share(record, env, title, files, selected, place, processes) for place in range(processes)
    ]
    known, shown = set(suite_plugin.read(record.tests)), time.monotonic()
    reported: set[str] = set(known)
    running = list(shares)
    try:
        while running and time.monotonic() < until:
            running = [share for share in running if share.goes_on()]
            time.sleep(_POLL)
            if time.monotonic() > shown + _SUMMARY:
                _report(record, reported)
                record.summarize(record)
                shown = time.monotonic()
    finally:
        for share in shares:
            kill_group(share.process)
    _report(record, reported)
    ours = {name: row for name, row in suite_plugin.read(record.tests).items() if name not in known}
    outcome = Outcome(Counter(row["outcome"] for row in ours.values()))
    record.say(f"{title}: {outcome.text}")
    if running or outcome.counts["selected"] + outcome.counts["started"]:
        why = "until no time was left" if running else "until its processes died too often"
        record.cut.append(f"{title}: {outcome.text}, {why}")
    elif not ours and title not in record.failed:
        record.failure(title, f"no test was selected\n{tail(shares[0].log)}")


def _report(record: Record, reported: set[str]) -> None:
    """Writes down the failures that are new."""
    for name, row in suite_plugin.read(record.tests).items():
        if row["outcome"] == "failed" and name not in reported:
            reported.add(name)
            record.failure(name, row["detail"])


class _Share:
    """Some of the tests, in one process at a time."""

    def __init__(
        self,
        record: Record,
        env: dict[str, str],
        title: str,
        files: tuple[str, ...],
        selected: str,
        place: int,
        count: int,
    ) -> None:
        self.record, self.title, self.place, self.count = record, title, place, count
        self.log = record.log(f"{title}-{place}".replace(" ", "-"))
        self.command = [sys.executable, "-m", "pytest", *files, "-k", selected, "-v", "--color=no"]
        self.command += ["-p", "no:cacheprovider", "-p", "benchmarks.measure.suite_plugin"]
        self.command += ["--continue-on-collection-errors"]
        self.env = env | {
            suite_plugin.OUTCOMES: str(record.tests.resolve()),
            suite_plugin.SHARE: f"{place}/{count}",
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
        last = suite_plugin.read(self.record.tests)
        running = [
            name
            for name, row in last.items()
            if row["outcome"] == "started" and suite_plugin.place_of(name, self.count) == self.place
        ]
        detail = f"its process ended with {code}\n{tail(self.log)}"
        rows = [{"test": name, "outcome": "failed", "detail": detail} for name in running]
        suite_plugin.write(self.record.tests, rows)
        died = code < 0 or code == suite_plugin.DEVICE_LOST
        if died and self.starts < _STARTS:
            self.start()
            return True
        if not rows and self.title not in self.record.failed:
            self.record.failure(self.title, f"pytest ended with {code}\n{tail(self.log)}")
        return False


def start(command: list[str], env: dict[str, str], log: Path, **how: Any) -> Any:
    """A process in a session of its own, whose output goes to the end of a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **how,
        )


def kill_group(process: Any) -> None:
    """Ends a process that leads a session, and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, start: int = 0, characters: int = 6000) -> str:
    """The end of what a log has from a place on."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-characters:]

"""Measures providers in processes that may fail, hang or run out of time."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.measure.processes import kill_group, start, tail
from benchmarks.measure.worker import Job, Task
from benchmarks.providers.registry import Case, find, why_not_at_all
from benchmarks.results.folder import Folder
from benchmarks.shapes import Shape, name_of

DTYPE = torch.bfloat16
TURNS = 11
_WORKSPACE = 2 * 2**30
_SMALLEST = 1024
# A provider that takes down its process so often is not tried on other shapes any more.
_STRIKES = 2
# Starting a process takes about as long as measuring so many providers.
_START = 2
# A family may take so many times its share, because most families need less than theirs.
_OVERDRAFT = 1.5
# Triton's kernels get so many shares of the time, because there are the most of them.
_WEIGHT = {"bft triton": 2}
# The part of a device's memory that an allocator gets.
_USABLE = 0.9

Measured = Iterator[tuple[Job, dict[str, Any]]]


@dataclass
class Family:
    """Providers that share a process, and how often each of them took one down."""

    jobs: list[Job]
    end: float
    limit: float  # seconds of one job
    strikes: dict[Case, list[str]] = field(default_factory=dict)  # how the process ended, each time


def measure_all(
    folder: Folder,
    end: float,
    shapes: Sequence[Shape],
    cases: Sequence[Case],
    turns: int = TURNS,
) -> None:
    """Writes a row for every case and shape; one that is not measured by ``end`` is cut."""
    asked = {fit(shape, _room(folder.device)): shape for shape in shapes}
    families: dict[str, list[Case]] = {}
    for case in cases:
        if reason := _missing(folder, case):
            for shape in asked:
                _write(folder, asked, Job(case, shape), {"status": "unavailable", "reason": reason})
        else:
            families.setdefault(find(case.provider).family, []).append(case)
    weights = [_START + _WEIGHT.get(name, 1) * len(cases) for name, cases in families.items()]
    for place, members in enumerate(families.values()):
        now = time.monotonic()
        share = _OVERDRAFT * (end - now) * weights[place] / sum(weights[place:])
        # A provider that hangs must leave some time for the others of its family.
        limit = share if len(members) == 1 else share / 3
        jobs = [Job(member, shape) for shape in asked for member in members]
        for job, row in _measure(Family(jobs, min(end, now + share), limit), folder, turns):
            _write(folder, asked, job, row)


def compile_ahead(
    folder: Folder, end: float, shapes: Sequence[Shape], cases: Sequence[Case], processes: int
) -> None:
    """Runs a step of each of ours, in several processes: Triton keeps what they compile on disk.

    Kernels are compiled for a width, so one shape of each width is enough. What fails here fails
    again when it is measured.
    """
    room = _room(folder.device)
    widths = list({shape.width: fit(shape, room) for shape in reversed(shapes)}.values())
    processes = max(1, int(min(processes, room / max(map(needed, widths)))))
    ours = [case for case in cases if find(case.provider).backend == "triton"]
    jobs = [Job(one, shape) for shape in widths for one in ours if not _missing(folder, one)]

    def run(place: int) -> None:
        family = Family(jobs[place::processes], end, max(0.0, end - time.monotonic()))
        list(_measure(family, folder, 0, f"compile-{place}"))

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, range(processes)))
    folder.say(f"compiled ahead: {len(jobs)} steps in {processes} processes")


def needed(shape: Shape) -> int:
    """The bytes of inputs and gradients, of a float32 gradient of ``weight``, and 2 GiB."""
    weight = shape.vocabulary * shape.width
    return 4 * (shape.tokens * shape.width + weight) + 4 * weight + _WORKSPACE


def fit(shape: Shape, memory: float) -> Shape:
    """The shape, with tokens and vocabulary halved until a fused loss in 16 bits has room."""
    while needed(shape) > memory and min(shape.tokens, shape.vocabulary) > _SMALLEST:
        shape = Shape(shape.tokens // 2, shape.width, shape.vocabulary // 2)
    return shape


def _room(device: str) -> float:
    """The bytes that all processes may take; without limit on a CPU."""
    if device == "cpu":
        return math.inf
    return _USABLE * torch.cuda.get_device_properties(0).total_memory


def _missing(folder: Folder, case: Case) -> str:
    """Why no process need be started for a case; the process itself looks closer."""
    reasons = folder.reasons.get(find(case.provider).backend, "")
    return why_not_at_all(case, folder.device) or reasons


def _write(folder: Folder, asked: dict[Shape, Shape], job: Job, row: dict[str, Any]) -> None:
    """Writes what a process reports as a row of the results."""
    detail, status = row.pop("detail", row.get("reason", "")), row["status"]
    shape, whole = job.shape, asked[job.shape]
    where = {"shape": name_of(shape), "inputs": "synthetic", "memory_kept": False}
    where["dtype"] = str(DTYPE).removeprefix("torch.")
    if whole != shape:
        where["scaled_down_from"] = f"{whole.tokens} x {whole.vocabulary}"
    folder.row(job.case.columns | asdict(shape) | where | row)
    if "seconds" in row:
        folder.say(f"{job}: {row['seconds']:.4f} s, {row['times_g']:.2f} G")
    # If a peer runs out of memory, that is a result, not a failure.
    no_room = status == "out of memory" and not find(job.case.provider).backend
    if status == "unavailable" or no_room:
        folder.say(f"{job}: {status}: {row['reason']}")
    elif status == "cut":
        folder.cut.append(f"{job}: {row['reason']}")
    elif status != "ok":
        folder.failure(f"{job}: {status}", detail)


def _measure(family: Family, folder: Folder, turns: int, title: str = "") -> Measured:
    """Starts processes until every job of a family has a row."""
    while family.jobs:
        left = family.end - time.monotonic()
        if left <= 0:
            reason = "no time was left to start it"
            yield from ((job, {"status": "cut", "reason": reason}) for job in family.jobs)
            return
        log = folder.log(re.sub(r"\W+", "-", title or str(family.jobs[0].case)))
        before = log.stat().st_size if log.exists() else 0
        ours, theirs = Pipe()
        code = f"from benchmarks.measure.worker import serve; serve({theirs.fileno()})"
        process = start([sys.executable, "-c", code], folder.env, log, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            ours.send(Task(tuple(family.jobs), DTYPE, folder.device, left, turns))
            lives = True
            while family.jobs and lives:
                job = family.jobs.pop(0)
                row, lives = _receive(family, process, ours)
                if not lives:
                    family.strikes.setdefault(job.case, []).append(row["status"])
                    row.setdefault("detail", f"{row['reason']}\n{tail(log, before)}")
                yield job, row
        finally:
            kill_group(process)
            ours.close()
        tired = {case: ends for case, ends in family.strikes.items() if len(ends) >= _STRIKES}
        for job in [job for job in family.jobs if job.case in tired]:
            family.jobs.remove(job)
            cut = set(tired[job.case]) == {"cut"}
            what = "was not done in time" if cut else "took its process down"
            reason = f"it {what} {_STRIKES} times before"
            yield job, {"status": "cut" if cut else "failed", "reason": reason}


def _receive(
    family: Family, process: subprocess.Popen[bytes], connection: Connection
) -> tuple[dict[str, Any], bool]:
    """The next row, and whether the process can continue: it is neither dead nor out of time."""
    allowed = min(family.limit, max(0.0, family.end - time.monotonic()))
    try:
        if connection.poll(allowed):
            return connection.recv()
        return {"status": "cut", "reason": f"not done after {allowed:.0f} s"}, False
    except (EOFError, ConnectionError):
        process.wait()
        return {"status": "failed", "reason": f"its process ended with {process.returncode}"}, False

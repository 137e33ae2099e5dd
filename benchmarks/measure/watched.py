"""Measures providers in processes that may fail, hang or run out of time."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.suite import kill_group, start, tail
from benchmarks.measure.worker import Job, Task
from benchmarks.providers.candidates import Candidate, find, why_missing
from benchmarks.results.folder import Record
from benchmarks.shapes import Shape

# In order of importance: when time runs out, the last ones are missing.
SHAPES = (
    Shape(8192, 4096, 131_072),
    Shape(8192, 4096, 151_936),
    Shape(4096, 4096, 128_256),
    Shape(16_384, 2048, 248_320),
    Shape(1024, 4096, 128_256),
)
# For the interpreter, which takes about a second for a step of this.
REHEARSAL = (Shape(8, 16, 64),)

_WORKSPACE = 2 * 2**30
_SMALLEST = 1024

DTYPE = torch.bfloat16
TURNS = 11
# A provider that takes its process down is tried again on other shapes, but not for ever.
_STRIKES = 2
# Starting a process costs about as much time as measuring two providers.
_START = 2
# Most families need less than their share of the time: one may take this much of it.
_OVERDRAFT = 1.5
# An allocator does not get all of a device's memory.
_USABLE = 0.9


@dataclass
class Family:
    """Providers that share a process, and which of them took one down how often."""

    jobs: list[Job]
    end: float
    limit: float  # seconds of one job
    strikes: dict[str, list[str]]  # how it ended, each time


def measure_all(
    record: Record,
    env: dict[str, str],
    end: float,
    shapes: Sequence[Shape],
    names: Sequence[str],
    turns: int = TURNS,
) -> None:
    """A row for every provider and shape; whatever is not measured by ``end`` is cut."""
    asked = {fit(shape, record.device): shape for shape in shapes}
    write = _Writer(record, asked)
    families: dict[str, list[Candidate]] = {}
    for name in names:
        candidate = find(name)
        missing = why_missing(candidate, record.device, record.reasons)
        if missing:
            for shape in asked:
                write(Job(name, shape), {"status": "unavailable", "reason": missing})
        else:
            families.setdefault(candidate.family, []).append(candidate)
    weights = [_START + sum(one.weight for one in members) for members in families.values()]
    for place, members in enumerate(families.values()):
        now = time.monotonic()
        share = _OVERDRAFT * (end - now) * weights[place] / sum(weights[place:])
        until = min(end, now + share)
        jobs = [Job(member.name, shape) for shape in asked for member in members]
        # One that hangs must leave some time for the others of its family.
        limit = share if len(members) == 1 else share / 3
        family = Family(jobs, until, limit, {})
        for job, row in _measure(family, record, env, turns):
            write(job, row)


def compile_ahead(
    record: Record,
    env: dict[str, str],
    end: float,
    shapes: Sequence[Shape],
    names: Sequence[str],
    processes: int,
) -> None:
    """A step of each of ours, in several processes: Triton keeps what they compile on disk.

    Kernels are compiled for a width: one shape of each will do. What fails here fails again where
    it is measured.
    """
    fitting = (fit(shape, record.device) for shape in shapes)
    widths = list({shape.width: shape for shape in reversed(list(fitting))}.values())
    if record.device == "cuda":
        room = int(_USABLE * torch.cuda.get_device_properties(0).total_memory)
        processes = max(1, min(processes, room // max(needed(shape) for shape in widths)))
    members = [find(name) for name in names]
    ours = [
        member
        for member in members
        if member.family == "bft triton" and not why_missing(member, record.device, record.reasons)
    ]
    jobs = [Job(member.name, shape) for shape in widths for member in ours]

    def run(place: int) -> None:
        mine = jobs[place::processes]
        family = Family(mine, end, max(0.0, end - time.monotonic()), {})
        for _ in _measure(family, record, env, 0, f"compile-{place}"):
            pass

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, range(processes)))
    record.say(f"compiled ahead: {len(jobs)} steps in {processes} processes")


def needed(shape: Shape) -> int:
    """Bytes for inputs and gradients, a gradient of ``weight`` in float32 and 2 GiB."""
    weight = shape.vocabulary * shape.width
    return 4 * (shape.tokens * shape.width + weight) + 4 * weight + _WORKSPACE


def fit_to(shape: Shape, memory: int) -> Shape:
    """The shape, its tokens and vocabulary halved until a fused loss in 16 bits has room for it."""
    while needed(shape) > memory and min(shape.tokens, shape.vocabulary) > _SMALLEST:
        shape = Shape(shape.tokens // 2, shape.width, shape.vocabulary // 2)
    return shape


def fit(shape: Shape, device: str) -> Shape:
    """The shape as it has room on the device."""
    if device == "cpu":
        return shape
    memory = torch.cuda.get_device_properties(0).total_memory
    return fit_to(shape, int(memory * _USABLE))


@dataclass
class _Writer:
    """Turns what a process reports into a row of the results."""

    record: Record
    asked: dict[Shape, Shape]

    def __call__(self, job: Job, row: dict[str, Any]) -> None:
        detail = row.pop("detail", row.get("reason", ""))
        candidate, shape, asked = find(job.provider), job.shape, self.asked[job.shape]
        where = f"{job.provider}, N {shape.tokens}, D {shape.width}, V {shape.vocabulary}"
        row |= {
            "provider": job.provider,
            "family": candidate.family,
            "tokens": shape.tokens,
            "width": shape.width,
            "vocabulary": shape.vocabulary,
            "scaled_down_from": "" if asked == shape else f"{asked.tokens} x {asked.vocabulary}",
            "dtype": str(DTYPE).removeprefix("torch."),
            "eps": "" if candidate.eps is None else candidate.eps,
        }
        self.record.row(row)
        if "seconds" in row:
            self.record.say(f"{where}: {row['seconds']:.4f} s, {row['times_g']:.2f} G")
        ours = candidate.family.startswith("bft ")
        fits = row["status"] == "out of memory" and not ours  # a result about a peer, no failure
        if row["status"] in ("ok", "unavailable") or fits:
            if "seconds" not in row:
                self.record.say(f"{where}: {row['status']}: {row['reason']}")
        elif row["status"] == "cut":
            self.record.cut.append(f"{where}: {row['reason']}")
        else:
            self.record.failure(f"{where}: {row['status']}", detail)


def _measure(
    family: Family, record: Record, env: dict[str, str], turns: int, title: str = ""
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Starts processes until every job of a family has its row."""
    while family.jobs:
        left = family.end - time.monotonic()
        if left <= 0:
            reason = "no time was left to start it"
            yield from ((job, {"status": "cut", "reason": reason}) for job in family.jobs)
            return
        log = record.log(re.sub(r"\W+", "-", title or family.jobs[0].provider))
        before = log.stat().st_size if log.exists() else 0
        with _process(log, env) as (process, connection):
            connection.send(Task(tuple(family.jobs), DTYPE, record.device, left, turns))
            yield from _receive(family, process, connection, log, before)
        out = {name for name, ends in family.strikes.items() if len(ends) >= _STRIKES}
        tired = [job for job in family.jobs if job.provider in out]
        family.jobs = [job for job in family.jobs if job not in tired]
        for job in tired:
            cut = all(how == "cut" for how in family.strikes[job.provider])
            what = "was not done in time" if cut else "took its process down"
            reason = f"it {what} {_STRIKES} times before"
            yield job, {"status": "cut" if cut else "failed", "reason": reason}


@contextlib.contextmanager
def _process(
    log: Path, env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    ours, theirs = Pipe()
    code = f"from benchmarks.measure.worker import serve; serve({theirs.fileno()})"
    process = start([sys.executable, "-c", code], env, log, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        yield process, ours
    finally:
        kill_group(process)
        ours.close()


def _receive(
    family: Family,
    process: subprocess.Popen[bytes],
    connection: Connection,
    log: Path,
    before: int,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Rows of one process, until it is done, dead or out of time."""
    while family.jobs:
        job = family.jobs.pop(0)
        allowed = min(family.limit, max(0.0, family.end - time.monotonic()))
        lives = False
        try:
            if connection.poll(allowed):
                row, lives = connection.recv()
            else:
                row = {"status": "cut", "reason": f"not done after {allowed:.0f} s"}
        except (EOFError, ConnectionError):
            process.wait()
            row = {"status": "failed", "reason": f"its process ended with {process.returncode}"}
        if not lives:
            family.strikes.setdefault(job.provider, []).append(row["status"])
            row.setdefault("detail", f"{row['reason']}\n{tail(log, before)}")
        yield job, row
        if not lives:
            return

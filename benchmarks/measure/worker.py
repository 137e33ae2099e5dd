"""The process that measures providers: it may die, and other results stay."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import timing
from benchmarks.measure.errors import Truth, some_rows, step_errors, truth
from benchmarks.measure.memory import peak_of_step
from benchmarks.measure.processes import explain, first_line
from benchmarks.providers.registry import Case, Provider, find, why_not
from benchmarks.shapes import Problem, Shape, expected_entries, text_like

# The largest relative error of a loss in float32; peers also sum in 16 bits.
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Job:
    """One row of the results."""

    case: Case
    shape: Shape

    def __str__(self) -> str:
        n, d, v = self.shape.tokens, self.shape.width, self.shape.vocabulary
        return f"{self.case}, N {n}, D {d}, V {v}"


@dataclass(frozen=True)
class Task:
    """The task of a process."""

    jobs: tuple[Job, ...]
    dtype: torch.dtype
    device: str
    seconds: float  # the time for all jobs
    turns: int


def serve(descriptor: int) -> None:
    """Measures the jobs that come over a connection, and sends back a row for each.

    With the row it sends whether the device is still usable. If it is not, the process ends, and
    its parent starts another one for the other jobs.
    """
    faulthandler.enable()
    connection = Connection(descriptor)
    task: Task = connection.recv()
    end = time.monotonic() + task.seconds
    for place, job in enumerate(task.jobs):
        share = (end - time.monotonic()) / (len(task.jobs) - place)
        row, lives = _attempt(job, task, time.monotonic() + share)
        connection.send((row, lives))
        if not lives:
            os._exit(1)  # a normal exit would wait for the device


def _attempt(job: Job, task: Task, until: float) -> tuple[dict[str, Any], bool]:
    """A row in any case, and whether the device is still usable."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code for any shape, made at the second shape, is slower
    if task.device == "cuda":
        torch.cuda.empty_cache()
    try:
        return measure(job, task, until), True
    except torch.OutOfMemoryError as error:
        row = {"status": "out of memory", "reason": first_line(error)}
    except Exception as error:
        row = {"status": "failed", "reason": explain(error), "detail": traceback.format_exc()}
    try:
        timing.synchronize(task.device)
    except Exception:
        return row, False
    return row, True


def measure(job: Job, task: Task, until: float) -> dict[str, Any]:
    """Measures errors, interleaved times and peak memory of one provider."""
    device, provider = task.device, find(job.case.provider)
    if reason := why_not(job.case, device, task.dtype):
        return {"status": "unavailable", "reason": reason}
    problem = text_like(job.shape, task.dtype, device)
    case = timing.fastest_option(job.case, problem, device) if task.turns else job.case
    row: dict[str, Any] = {"status": "ok", "reason": "", "options": case.option}
    started = time.perf_counter()
    timing.step(case, problem)
    timing.synchronize(device)
    row["first_seconds"] = time.perf_counter() - started
    if task.turns == 0:  # the task was to compile
        return row
    row |= _checked(case, problem, job.shape, task)
    if provider.eps is not None:
        row["entries_per_token"] = expected_entries(problem, provider.eps)
    blocking = _blocking(job.shape, task.dtype, device)
    bare = functools.partial(timing.bare_product, problem, *blocking)
    runs = {"bare": bare, "own": functools.partial(timing.step, case, problem)}
    times = timing.time_turns(runs, device, task.turns, until=until)
    row |= timing.rates(times["own"], times["bare"], job.shape, task.dtype.itemsize, case)
    return row | _memory(provider, case, problem, device)


@functools.cache
def _blocking(shape: Shape, dtype: torch.dtype, device: str) -> timing.Blocking:
    return timing.fastest_blocking(text_like(shape, dtype, device), device)


@functools.cache
def _truth(shape: Shape, dtype: torch.dtype, device: str, weighting: str) -> Truth:
    problem = text_like(shape, dtype, device)
    return truth(problem, weighting, dtype, some_rows(problem))


def _checked(case: Case, problem: Problem, shape: Shape, task: Task) -> dict[str, Any]:
    """Relative errors; status "wrong" if rounding, sampling or filtering do not explain them."""
    provider = find(case.provider)
    try:
        expected = _truth(shape, task.dtype, task.device, case.weighting)
    except torch.OutOfMemoryError:
        return {"reason": "gradients not checked: no memory for the torch backend's"}
    errors = step_errors(case, problem, expected)
    limits = {"error_loss": LOSS_TOLERANCE} if provider.backend else {}
    # The comparison is written so that a NaN is wrong.
    wrong = [
        f"{name} is {value:.3g}, expected up to {limits.get(name, provider.allowed)}"
        for name, value in errors.items()
        if not value <= limits.get(name, provider.allowed)
    ]
    return errors | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def _memory(provider: Provider, case: Case, problem: Problem, device: str) -> dict[str, Any]:
    """The peak bytes of a step beyond inputs and gradients, and its listed entries a token."""
    offsets = (problem.target.numel() + 1,)
    listed: list[Tensor] = []

    def look(saved: Tensor) -> Tensor:
        if saved.dtype == torch.int64 and saved.shape == offsets:
            listed.append(saved[-1])
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved)
    with contextlib.nullcontext() if provider.eps is None else hooks:
        row: dict[str, Any] = {"extra_bytes": peak_of_step(case, problem, device)}
    if listed:
        row["listed_per_token"] = int(listed[-1]) / problem.target.numel()
    return row

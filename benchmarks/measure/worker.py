"""The process in which providers are measured: it may die without taking other results along."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.errors import relative_error
from benchmarks.measure.timing import (
    bare_product,
    first_line,
    gradient_bytes,
    in_use,
    seconds,
    step,
    synchronize,
)
from benchmarks.providers.candidates import Candidate, find
from benchmarks.providers.losses import ours
from benchmarks.shapes import Problem, Shape, expected_entries, text_like

# Rows and columns of the blocks in which the bare product is tried; None: all of them.
BLOCKINGS: tuple[tuple[int | None, int | None], ...] = (
    (None, None),
    (None, 16_384),
    (None, 4096),
    (2048, None),
)
# Relative error of a loss whose terms and sums are float32; peers also sum in 16 bits.
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Job:
    """One row of the results."""

    provider: str
    shape: Shape


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    jobs: tuple[Job, ...]
    dtype: torch.dtype
    device: str
    seconds: float  # that it has for all jobs
    turns: int


@dataclass(frozen=True)
class Gradients:
    """A loss and parts of its gradients, on the CPU."""

    loss: Tensor  # []
    hidden: Tensor | None  # of some 64 rows, [<= 127, D]
    weight: tuple[Tensor, ...]  # of frequent ids and of the rarest targets, [<= 64, D] each


def serve(descriptor: int) -> None:
    """Measures the jobs that come over a connection, and sends back a row for each.

    With the row it sends whether the device is still usable. Where it is not the process ends; its
    parent starts another one for the jobs that are left.
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
            os._exit(1)  # leaving in order would wait for the device


def _attempt(job: Job, task: Task, until: float) -> tuple[dict[str, Any], bool]:
    """A row, whatever happens, and whether the device is still usable."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code for any shape, made for the second one, is slower
    if task.device == "cuda":
        torch.cuda.empty_cache()
    try:
        return measure(job, task, until), True
    except torch.OutOfMemoryError as error:
        row = {"status": "out of memory", "reason": first_line(error)}
    except Exception as error:
        row = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        row["detail"] = traceback.format_exc()
    try:
        synchronize(task.device)
    except Exception:
        return row, False
    return row, True


def measure(job: Job, task: Task, until: float) -> dict[str, Any]:
    """Errors, peak memory and interleaved times of one provider."""
    candidate, device = find(job.provider), task.device
    problem = text_like(job.shape, task.dtype, device)
    row: dict[str, Any] = {"status": "ok", "reason": ""}
    started = time.perf_counter()
    loss = step(candidate.run, problem)
    synchronize(device)
    row["first_seconds"] = time.perf_counter() - started
    if task.turns == 0:  # it was to be compiled
        return row
    row |= _compare(candidate, _parts(loss, problem), job, task)
    if candidate.eps is not None:
        row["entries_per_token"] = expected_entries(problem, candidate.eps)
    blocking = _fastest_blocking(job.shape, task.dtype, device)
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_product(problem, *blocking),
        "own": lambda: step(candidate.run, problem),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    least = min(3, task.turns)
    while len(samples["own"]) < task.turns:
        if len(samples["own"]) >= least and time.monotonic() > until:
            break
        for name, run in runs.items():
            samples[name].append(seconds(run, device))
    row |= _memory(candidate, problem, device)
    taken, bare = (statistics.median(samples[name]) for name in ("own", "bare"))
    return row | {
        "seconds": taken,
        "fastest_seconds": min(samples["own"]),
        "slowest_seconds": max(samples["own"]),
        "turns": len(samples["own"]),
        "bare_seconds": bare,
        "times_g": taken / bare,
        "tokens_per_second": job.shape.tokens / taken,
    }


def _parts(loss: Tensor, problem: Problem) -> Gradients:
    hidden, weight = problem.hidden.grad, problem.weight.grad
    rare = problem.target.unique()[-64:]  # ids go by rank
    every = max(1, problem.target.numel() // 64)
    return Gradients(
        loss.float().cpu(),
        None if hidden is None else hidden[::every].float().cpu(),
        () if weight is None else (weight[:64].float().cpu(), weight[rare].float().cpu()),
    )


@functools.cache
def _truth(shape: Shape, dtype: torch.dtype, device: str, weighted: bool) -> Gradients:
    """From the exact gradient of the torch backend, itself tested against the specification."""
    problem = text_like(shape, dtype, device)
    loss = ours(problem, "bft" if weighted else "plain", backend="torch")
    loss.backward()
    return _parts(loss.detach(), problem)


def _compare(candidate: Candidate, got: Gradients, job: Job, task: Task) -> dict[str, Any]:
    """Relative errors, and status "wrong" where they are no rounding, sampling or filtering."""
    try:
        truth = _truth(job.shape, task.dtype, task.device, candidate.balanced)
    except torch.OutOfMemoryError:
        return {"reason": "gradients not checked: no memory for the torch backend's"}
    errors: dict[str, Any] = {"error_loss": relative_error(got.loss, truth.loss)}
    if got.hidden is not None and truth.hidden is not None:
        errors["error_hidden"] = relative_error(got.hidden, truth.hidden)
    if got.weight:
        pairs = zip(got.weight, truth.weight, strict=True)
        errors["error_weight"] = max(relative_error(mine, theirs) for mine, theirs in pairs)
    limits = {"error_loss": LOSS_TOLERANCE} if candidate.balanced else {}
    # Written so that a NaN is wrong.
    wrong = [
        f"{name} is {value:.3g}, expected up to {limits.get(name, candidate.allowed)}"
        for name, value in errors.items()
        if not value <= limits.get(name, candidate.allowed)
    ]
    return errors | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def _memory(candidate: Candidate, problem: Problem, device: str) -> dict[str, Any]:
    """Peak bytes of a step beyond inputs and gradients, and entries a token in its lists."""
    offsets = (problem.target.numel() + 1,)
    listed: list[Tensor] = []

    def look(saved: Tensor) -> Tensor:
        if saved.dtype == torch.int64 and saved.shape == offsets:
            listed.append(saved[-1])
        return saved

    problem.hidden.grad = problem.weight.grad = None
    synchronize(device)
    before = in_use(device, reset=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved)
    with contextlib.nullcontext() if candidate.eps is None else hooks:
        step(candidate.run, problem)
    synchronize(device)
    peak = in_use(device, peak=True)
    row: dict[str, Any] = {"extra_bytes": max(0, peak - before - gradient_bytes(problem))}
    if listed:
        row["listed_per_token"] = int(listed[-1]) / problem.target.numel()
    return row


@functools.cache
def _fastest_blocking(
    shape: Shape, dtype: torch.dtype, device: str
) -> tuple[int | None, int | None]:
    """Of the bare product."""
    problem = text_like(shape, dtype, device)
    times: dict[tuple[int | None, int | None], float] = {}
    for blocking in BLOCKINGS:
        try:
            taken = [seconds(lambda b=blocking: bare_product(problem, *b), device) for _ in "123"]  # type: ignore[misc]
        except torch.OutOfMemoryError:
            continue
        times[blocking] = min(taken[1:])
    return min(times, key=lambda blocking: times[blocking])

"""Interleaved timings, as multiples of a bare GEMM."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers.registry import Case, find
from benchmarks.shapes import Problem, Shape

Blocking = tuple[int | None, int | None]
# Rows and columns of the blocks in which the bare GEMM is tried; None for all of them.
BLOCKINGS: dict[str, tuple[Blocking, ...]] = {
    "cpu": ((None, None), (512, None), (None, 4096), (None, 1024), (1024, 512), (512, 1024)),
    "cuda": ((None, None), (None, 16_384), (None, 4096), (2048, None)),
}
_LEAST_TURNS = 3  # so many are timed even if time is short


def step(run: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """Runs the forward, and the backward if the loss has gradients; returns the loss ``[]``."""
    problem.hidden.grad = problem.weight.grad = None
    loss = run(problem)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def synchronize(device: str) -> None:
    """Waits until a device that runs behind the host has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """The wall time of one run, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def bare_product(problem: Problem, rows: int | None, columns: int | None) -> None:
    """Computes all logits, block by block in one reused buffer."""
    hidden, weight = problem.hidden, problem.weight
    rows, columns = rows or hidden.shape[0], columns or weight.shape[0]
    buffer = hidden.new_empty(min(rows, hidden.shape[0]) * min(columns, weight.shape[0]))
    for part in weight.split(columns):
        for operand in hidden.split(rows):
            shape = operand.shape[0], part.shape[0]
            torch.mm(operand, part.T, out=buffer[: shape[0] * shape[1]].view(shape))


@dataclass(frozen=True)
class Timing:
    """The times of repeated runs, as columns of a row."""

    seconds: float  # median
    spread: float  # interquartile range over the median
    fastest_seconds: float
    slowest_seconds: float
    repeats: int


def timing(samples: list[float]) -> Timing:
    """The timing of at least one sample."""
    median, spread = statistics.median(samples), 0.0
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = (high - low) / median
    return Timing(median, spread, min(samples), max(samples), len(samples))


def time_turns(
    runs: Mapping[Any, Callable[[], object]],
    device: str,
    repeats: int,
    *,
    lasting: float = 0.0,
    until: float = math.inf,
) -> dict[Any, Timing]:
    """Times the runs in turns, so that noise hits all alike; a first turn warms up.

    Short turns are repeated until ``lasting`` seconds have passed. After ``until``, a time of
    ``time.monotonic()``, three turns are enough.
    """
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for turn in itertools.count():
        now = time.monotonic()
        if (turn > repeats and now >= started + lasting) or (turn > _LEAST_TURNS and now > until):
            break
        for name, run in runs.items():
            taken = seconds(run, device)
            if turn > 0:
                samples[name].append(taken)
    return {name: timing(values) for name, values in samples.items()}


def time_all(
    problem: Problem, device: str, repeats: int, cases: Sequence[Case]
) -> tuple[Timing, dict[Case, Timing]]:
    """Times 1G, the fastest of the ``BLOCKINGS`` of the bare GEMM, and each case."""
    partial, blockings = functools.partial, BLOCKINGS[device]
    runs = {blocking: partial(bare_product, problem, *blocking) for blocking in blockings}
    runs |= {case: partial(step, case, problem) for case in cases}
    times = time_turns(runs, device, repeats)
    return min((times.pop(one) for one in blockings), key=lambda one: one.seconds), times


def fastest_blocking(problem: Problem, device: str, repeats: int = 2) -> Blocking:
    """The fastest blocking of the bare GEMM, among those for which there is memory."""
    runs = {}
    for blocking in BLOCKINGS[device]:
        run = functools.partial(bare_product, problem, *blocking)
        with contextlib.suppress(torch.OutOfMemoryError):
            run()
            runs[blocking] = run
    times = time_turns(runs, device, repeats)
    return min(times, key=lambda one: times[one].seconds)


def fastest_option(case: Case, problem: Problem, device: str) -> Case:
    """The case with the fastest option of its provider, if there are several."""
    options = [replace(case, option=option) for option in find(case.provider).options]
    if len(options) == 1:
        return options[0]
    times = time_turns({one: functools.partial(step, one, problem) for one in options}, device, 2)
    return min(options, key=lambda one: times[one].seconds)


def rates(
    taken: Timing, bare: Timing, shape: Shape, itemsize: int, case: Case | None = None
) -> dict[str, Any]:
    """Columns of a time: multiples of 1G, and rates a second; of 1G itself without ``case``."""
    hidden, weight = shape.tokens * shape.width, shape.vocabulary * shape.width
    gradients = {"forward": 0, "both": hidden + weight, "frozen": hidden}
    moved = hidden + weight + (gradients[case.mode] if case else 0)
    products, eps = (case.products, find(case.provider).eps) if case else (1, None)
    return asdict(taken) | {
        "eps": "" if eps is None else eps,
        "g_seconds": bare.seconds,
        "times_g": taken.seconds / bare.seconds,
        "tokens_per_second": shape.tokens / taken.seconds,
        "flops_per_second": products * shape.flops / taken.seconds,
        "bytes_per_second": itemsize * moved / taken.seconds,
    }

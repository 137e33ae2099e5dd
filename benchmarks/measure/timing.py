"""Interleaved timings as multiples of a bare product, and peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.providers.registry import Case
from benchmarks.shapes import Problem, Shape, Source, make_problem

Name = TypeVar("Name", bound=Hashable)


def step(run: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """Forward and the gradients, of a loss that has any; the loss ``[]``."""
    problem.hidden.grad = problem.weight.grad = None
    loss = run(problem)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def gradient_bytes(problem: Problem) -> int:
    """Of the gradients that the last step made."""
    leaves = problem.hidden, problem.weight
    return sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


def synchronize(device: str) -> None:
    """Waits for a device that runs behind the host."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one run, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def keep_memory() -> None:
    """Has the C library keep what is freed, so that only the first run touches fresh pages.

    By default glibc returns every large tensor to the system, and a step pays for mapping and
    clearing its gradients anew: work of the system, the same whichever loss asked for them, but
    on a virtual machine as much as a tenth of a step.

    Raises:
        RuntimeError: the C library is not glibc, or refuses.
    """
    _mallopt("keep_memory", {-1: -1, -4: 0})  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h


def return_memory() -> None:
    """Has the C library return every tensor of 128 KiB and more to the system when it is freed.

    By default that bound grows with the tensors that are freed, and those below it are cut from
    larger blocks: what a step takes at its highest then differs from run to run by as much as 40%.

    Raises:
        RuntimeError: the C library is not glibc, or refuses.
    """
    _mallopt("return_memory", {-3: 2**17})  # M_MMAP_THRESHOLD of malloc.h; setting it fixes it


def _mallopt(name: str, settings: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError(f"{name}: the C library has no mallopt, expected glibc") from None
    if not all(mallopt(setting, value) for setting, value in settings.items()):
        raise RuntimeError(f"{name}: mallopt refused the setting")


# Rows and columns of the blocks in which the bare product is tried; None: all of them.
BLOCKINGS: tuple[tuple[int | None, int | None], ...] = (
    (None, None),
    (512, None),
    (None, 4096),
    (None, 1024),
    (1024, 512),
    (512, 1024),
)


@torch.no_grad()
def bare_product(problem: Problem, rows: int | None, columns: int | None) -> None:
    """All logits, block by block in one reused buffer."""
    hidden, weight = problem.hidden, problem.weight
    rows, columns = rows or hidden.shape[0], columns or weight.shape[0]
    buffer = hidden.new_empty(min(rows, hidden.shape[0]) * min(columns, weight.shape[0]))
    for part in weight.split(columns):
        for operand in hidden.split(rows):
            shape = operand.shape[0], part.shape[0]
            torch.mm(operand, part.T, out=buffer[: shape[0] * shape[1]].view(shape))


@dataclass(frozen=True)
class Timing:
    """Of repeated runs."""

    seconds: float  # median
    spread: float  # interquartile range over the median


def timing(samples: list[float]) -> Timing:
    """Median and spread of at least one time."""
    median = statistics.median(samples)
    if len(samples) < 2:
        return Timing(median, 0.0)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median)


def time_turns(
    runs: Mapping[Name, Callable[[], object]], device: str, repeats: int
) -> dict[Name, Timing]:
    """Times of each run, in turns so that noise hits all alike; a first turn warms up."""
    samples: dict[Name, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if turn > 0:
                samples[name].append(taken)
    return {name: timing(values) for name, values in samples.items()}


def time_all(
    problem: Problem, device: str, repeats: int, cases: list[Case]
) -> tuple[Timing, dict[Case, Timing]]:
    """1G, which is the fastest of the ``BLOCKINGS`` of the bare product, and each case."""
    runs: dict[Case | tuple[int | None, int | None], Callable[[], object]] = {}
    for blocking in BLOCKINGS:
        runs[blocking] = lambda b=blocking: bare_product(problem, *b)  # type: ignore[misc]
    for case in cases:
        runs[case] = lambda c=case: step(c, problem)  # type: ignore[misc]
    times = time_turns(runs, device, repeats)
    bare = min((times[blocking] for blocking in BLOCKINGS), key=lambda timing: timing.seconds)
    return bare, {case: times[case] for case in cases}


def first_line(error: object) -> str:
    """Enough of a message for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def start(
    target: Callable[..., None], *arguments: Any, daemon: bool = False
) -> tuple[Any, Connection]:
    """A fresh process that runs ``target(sender, *arguments)``, and the connection's other end.

    A daemon ends with this process, and can have no children of its own.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments), daemon=daemon)
    process.start()
    sender.close()
    return process, receiver


def extra_memory(case: Case, source: Source, dtype: torch.dtype, device: str) -> int:
    """Peak bytes of one step beyond the inputs and their gradients, in a fresh process.

    Raises:
        RuntimeError: that process failed.
    """
    process, receiver = start(_extra_memory, case, source, dtype, device)
    try:
        return int(receiver.recv())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{case.provider}: its process for memory ended with {process.exitcode}"
        ) from None
    finally:
        process.join()


def _extra_memory(
    sender: Connection, case: Case, source: Source, dtype: torch.dtype, device: str
) -> None:
    warm = make_problem(Shape(8, 16, 64), dtype, device)
    step(case, warm)  # libraries and thread pools are loaded before the baseline is read
    problem = make_problem(source, dtype, device)
    release(device)
    before = in_use(device, reset=True)
    step(case, problem)
    peak = in_use(device, peak=True)
    sender.send(max(0, peak - before - gradient_bytes(problem)))


def release(device: str) -> None:
    """Gives back what was freed, which must not pass for memory in use."""
    if device == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def in_use(device: str, *, reset: bool = False, peak: bool = False) -> int:
    """Bytes in use now, or at most since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:  # makes the kernel forget the highest mark of the set-up
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    field = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024

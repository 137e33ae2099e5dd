"""Interleaved timings as multiples of a bare product, and peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.providers import PEERS, PROVIDERS, Provider
from benchmarks.shapes import Problem, Shape, Source, make_problem


def step(provider: str | Provider, problem: Problem) -> Tensor:
    """Forward and the gradients, of a provider that has any; the loss."""
    problem.hidden.grad = problem.weight.grad = None
    run = (PROVIDERS | PEERS)[provider] if isinstance(provider, str) else provider
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
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError("keep_memory: the C library has no mallopt, expected glibc") from None
    if not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise RuntimeError("keep_memory: mallopt refused the setting")


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


def time_all(problem: Problem, device: str, repeats: int, names: list[str]) -> dict[str, float]:
    """Median seconds of each provider, in turns so that noise hits all alike.

    ``"1G"`` is the fastest of the ``BLOCKINGS`` of the bare product, timed among them.
    """
    runs: dict[str, Callable[[], object]] = {}
    for rows, columns in BLOCKINGS:
        runs[f"1G {rows} x {columns}"] = lambda r=rows, c=columns: bare_product(problem, r, c)  # type: ignore[misc]
    for name in names:
        runs[name] = lambda name=name: step(name, problem)  # type: ignore[misc]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if turn > 0:  # the first turn warms up
                samples[name].append(taken)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    fastest = min(medians.pop(name) for name in runs if name.startswith("1G "))
    return {"1G": fastest, **medians}


def extra_memory(provider: str, source: Source, dtype: torch.dtype, device: str) -> int:
    """Peak bytes of one step beyond the inputs and their gradients, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_extra_memory, args=(sender, provider, source, dtype, device))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError(f"{provider}: its process ended with {process.exitcode}") from None
    finally:
        process.join()


def _extra_memory(
    sender: Connection, provider: str, source: Source, dtype: torch.dtype, device: str
) -> None:
    warm = make_problem(Shape(8, 16, 64), dtype, device)
    step(provider, warm)  # libraries and thread pools are loaded before the baseline is read
    problem = make_problem(source, dtype, device)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not pass for memory in use
    before = in_use(device, reset=True)
    step(provider, problem)
    peak = in_use(device, peak=True)
    sender.send(max(0, peak - before - gradient_bytes(problem)))


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

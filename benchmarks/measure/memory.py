"""Peak memory of a step, in a fresh process, because on a CPU all of a process's memory counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure.timing import step, synchronize
from benchmarks.providers.registry import Case
from benchmarks.shapes import Problem, Shape, Source, make_problem


def keep_memory() -> None:
    """Makes the C library keep freed memory, so that only the first run touches fresh pages.

    By default glibc returns large tensors to the system, and a step pays for fresh pages anew
    (docs/performance.md). RuntimeError if the C library is not glibc, or refuses.
    """
    _mallopt("keep_memory", {-1: -1, -4: 0})  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h


def return_memory() -> None:
    """Makes the C library return every tensor of 128 KiB and more to the system when it is freed.

    By default that bound grows with the tensors that are freed, and smaller ones are cut from
    larger blocks. The peak of a step then differs from run to run by as much as 40%.
    """
    _mallopt("return_memory", {-3: 2**17})  # M_MMAP_THRESHOLD of malloc.h; setting it fixes it


def _mallopt(name: str, settings: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError(f"{name}: the C library has no mallopt, expected glibc") from None
    if not all(mallopt(setting, value) for setting, value in settings.items()):
        raise RuntimeError(f"{name}: mallopt refused the setting")


def release(device: str) -> None:
    """Gives back freed memory, so that it does not count as memory in use."""
    if device == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def in_use(device: str, *, reset: bool = False, peak: bool = False) -> int:
    """The bytes in use now, or their peak since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:  # makes the kernel forget the peak of the set-up
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    field = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of_step(run: Callable[[Problem], Tensor], problem: Problem, device: str) -> int:
    """The peak bytes of one step beyond the inputs and their gradients."""
    problem.hidden.grad = problem.weight.grad = None
    synchronize(device)
    release(device)
    before = in_use(device, reset=True)
    step(run, problem)
    synchronize(device)
    peak = in_use(device, peak=True)
    leaves = problem.hidden, problem.weight
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return max(0, peak - before - gradients)


def extra_memory(case: Case, source: Source, dtype: torch.dtype, device: str) -> int:
    """:func:`peak_of_step`, to be called in a fresh process."""
    # Libraries and thread pools are loaded before the baseline is read.
    step(case, make_problem(Shape(8, 16, 64), dtype, device))
    return peak_of_step(case, make_problem(source, dtype, device), device)

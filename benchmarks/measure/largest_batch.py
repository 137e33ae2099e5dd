"""Finds the largest batch of a fine-tuning step under a limit of memory, by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import psutil
from torch import Tensor

from benchmarks.measure.train_step import Job, Outcome, send_peak

_LOOK_EVERY = 0.01  # seconds between looks at a process's memory


def attempt(
    job: Job, label: str, ids: Tensor, *, limit: int | None = None, patience: float = float("inf")
) -> Outcome:
    """Runs one step on ``ids [B, T]`` in a fresh process, which is killed at the limit.

    The limit is in bytes, of the process's resident set on a CPU and of the device's allocator on a
    GPU. ``patience`` is in seconds from the start of the step on.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = sender, job, label, ids, limit
    process = context.Process(target=send_peak, args=arguments, daemon=True)  # ends with this one
    process.start()
    sender.close()
    try:
        failed = receiver.recv()
        if failed is not None:  # it failed before the step
            return failed
        return _watch(process, receiver, limit if job.device == "cpu" else None, patience)
    except EOFError:
        process.join()
        reason = f"its process ended with {process.exitcode}"
        return Outcome("failed", reason=f"{reason}, killed by the system for want of memory?")
    finally:
        process.kill()
        process.join()


def _watch(process: Any, receiver: Connection, limit: int | None, patience: float) -> Outcome:
    until = time.monotonic() + patience
    resident = psutil.Process(process.pid)
    while not receiver.poll(_LOOK_EVERY):
        if limit is not None and resident.memory_info().rss > limit:
            return Outcome("over")
        if time.monotonic() > until:
            return Outcome("slow", reason=f"took longer than {patience:g} s")
    outcome = receiver.recv()
    # The process's own peak also counts what rose between two looks.
    if limit is not None and outcome.peak is not None and outcome.peak > limit:
        return Outcome("over", outcome.peak)
    return outcome


def next_batch(batch: int) -> int:
    """The next larger batch to try: one more below 16, about 5% more above."""
    return batch + max(1, round(batch / 20))


def largest_batch(
    limit: int, cap: int, run: Callable[[int], Outcome], peaks: dict[int, int]
) -> tuple[int, str]:
    """The largest batch for which ``run`` says that it fits, by doubling and then by halves.

    It was run, and so was a batch of at most its :func:`next_batch`, which does not fit. None above
    ``cap`` is run. ``peaks`` has the bytes of completed batches, also of smaller limits, and gets
    those of this search. Returns the batch, 0 if not even one fits, and what did not fit.
    """
    fits = max((batch for batch, peak in peaks.items() if peak <= limit), default=0)
    fails: int | None = None
    while fits < cap and (fails is None or fails > next_batch(fits)):
        batch = min(cap, max(1, 2 * fits)) if fails is None else (fits + fails) // 2
        outcome = run(batch)
        if outcome.peak is not None:
            peaks[batch] = outcome.peak
        if outcome.status == "over":
            fails = batch
        elif outcome.status == "fits":
            fits = batch
        else:
            return fits, f"at least; {batch}: {outcome.reason}"
    return fits, f"{fails} did not fit" if fails else "at least; no larger one was allowed"

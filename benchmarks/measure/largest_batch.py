"""The largest batch of a fine-tuning step under a limit of memory, by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
from torch import Tensor

from benchmarks.measure.processes import spawn
from benchmarks.measure.train_step import Job, Outcome, send_peak

_LOOK_EVERY = 0.01  # seconds between looks at a process's memory


@dataclass(frozen=True)
class Largest:
    """The largest batch that was run within the limit."""

    batch: int  # sequences; 0 if not even one fits
    note: str  # the smallest that was run and did not fit, or why none was


def attempt(
    job: Job,
    label: str,
    ids: Tensor,  # [B, T]
    *,
    limit: int | None = None,
    patience: float = float("inf"),
) -> Outcome:
    """Runs one step in a fresh process, which is killed where it passes the limit.

    Args:
        limit: bytes: the process's resident set on a CPU, the device's allocator on a GPU.
        patience: seconds, from the start of the step on.
    """
    process, receiver = spawn(send_peak, job, label, ids, limit, daemon=True)
    try:
        failed: Outcome | None = receiver.recv()
        if failed is not None:  # before the step
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
    outcome: Outcome = receiver.recv()
    # The highest mark also tells of a peak between two looks.
    if limit is not None and outcome.peak is not None and outcome.peak > limit:
        return Outcome("over", outcome.peak)
    return outcome


def next_batch(batch: int) -> int:
    """The next larger one that is told apart: one more below 16, about 5% more above."""
    return batch + max(1, round(batch / 20))


def largest_batch(
    limit: int,
    cap: int,
    run: Callable[[int], Outcome],
    peaks: dict[int, int],
) -> Largest:
    """The largest batch for which ``run`` says that it fits, up to ``cap``.

    Both it and a batch of at most :func:`next_batch` of it, which does not fit, were run. The peak
    is close to a straight line in the batch once the activations outweigh the optimizer's work, so
    the two largest batches known say where to try next.

    Args:
        limit: bytes.
        cap: the largest batch to try.
        run: one step with a batch of so many.
        peaks: bytes of every completed batch so far, of smaller limits too; gets those of this
            search.
    """
    fits = max((batch for batch, peak in peaks.items() if peak <= limit), default=0)
    fails: int | None = None
    while fits < cap and (fails is None or fails > next_batch(fits)):
        batch = _propose(limit, cap, fits, fails, peaks)
        outcome = run(batch)
        if outcome.peak is not None:
            peaks[batch] = outcome.peak
        if outcome.status == "over":
            fails = batch
        elif outcome.status == "fits":
            fits = batch
        else:
            return Largest(fits, f"at least; {batch}: {outcome.reason}")
    note = f"{fails} did not fit" if fails is not None else "at least; no larger one was allowed"
    return Largest(fits, note)


def _propose(limit: int, cap: int, fits: int, fails: int | None, peaks: dict[int, int]) -> int:
    """The batch to try next."""
    highest = cap if fails is None else fails - 1
    lowest = min(next_batch(fits), highest)
    guess = 2 * fits
    known = sorted(peaks)[-2:]
    if len(known) == 2:
        slope = (peaks[known[1]] - peaks[known[0]]) / (known[1] - known[0])
        if slope > 0:
            guess = int(known[1] + (limit - peaks[known[1]]) / slope)
    if fails is None:
        # Below the line's bend the slope is too small: no leaps.
        highest = min(highest, max(lowest, 4 * fits))
    elif guess >= fails:
        guess = (fits + fails) // 2
    return min(max(guess, lowest), highest)

"""Blocks shared out among threads that do not wait for each other.

A loop of GEMMs and softmaxes, each on all threads, has them meet after every few milliseconds. One
that the system has put aside, because others use its core, holds up all; those that wait spin and
use up the time that they are given. Here the threads meet once: each takes the next block that may
be taken, with products and loops of one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from bft_kernels import _cpu


class Blocks:
    """Which block comes next, of parts of the rows times steps through the vocabulary.

    A part's steps are taken in their order, one at a time. No part is ``reach`` steps or more ahead
    of another, so that what the steps share is needed for so many of them only. What is computed
    does not depend on who computes it, nor when.

    Args:
        parts, steps: how many.
        reach: see above.
        in_turn: whether the parts go through each step one after the other: for sums over rows.
    """

    def __init__(self, parts: int, steps: int, reach: int, *, in_turn: bool = False) -> None:
        self.parts, self.steps = parts, steps
        self.reach, self.in_turn = reach, in_turn
        self._step = [0] * parts  # of each part: its next, or the one that is taken
        self._idle = set(range(parts if steps else 0))
        self._ended = False
        self._changed = threading.Condition()

    def take(self) -> tuple[int, int] | None:
        """A part and its step, which nobody else gets before it is done; waits for one if need be.

        ``None`` where there is none left to take: all are done, or will be by those who have them.
        """
        with self._changed:
            while self._idle and not self._ended:
                end = min(self._step) + self.reach
                ready = [
                    (self._step[part], part)
                    for part in self._idle
                    if self._step[part] < end and not self._waits_for_turn(part)
                ]
                if ready:
                    step, part = min(ready)
                    self._idle.remove(part)
                    return part, step
                self._changed.wait()
            return None

    def _waits_for_turn(self, part: int) -> bool:
        return self.in_turn and part > 0 and self._step[part - 1] == self._step[part]

    def done(self, part: int) -> None:
        """Says that the step of ``part`` that was taken is done."""
        with self._changed:
            self._step[part] += 1
            if self._step[part] < self.steps:
                self._idle.add(part)
            self._changed.notify_all()

    def end(self) -> None:
        """Lets nobody take any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def run(blocks: Blocks, compute: Callable[[int, int, int], None], threads: int) -> None:
    """Calls ``compute(worker, part, step)`` for every block, on up to ``threads`` threads.

    One thread is the caller's, whose products and loops may have more.

    Raises:
        BaseException: what a call raised first; blocks that nobody has taken by then are left out.
    """
    if threads == 1:
        with torch.inference_mode():
            for step in range(blocks.steps):
                for part in range(blocks.parts):
                    compute(0, part, step)
        return

    def work(worker: int) -> None:
        # Threads have modes of their own; what is computed here has no gradient.
        try:
            with torch.inference_mode():
                while taken := blocks.take():
                    compute(worker, *taken)
                    blocks.done(taken[0])
        except BaseException:
            blocks.end()
            raise

    _cpu.run_team(work, threads)

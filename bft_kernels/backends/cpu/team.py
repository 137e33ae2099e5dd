"""Blocks are shared out among threads that do not wait for each other.

If all threads work on each GEMM and each softmax of a loop, they meet every few milliseconds. When
the system puts a thread aside, because others use its core, that thread holds up all. The threads
that wait spin, and so use up the time that they are given. Here the threads meet only once. Each
takes the next free block, and computes its product and its loops alone.
"""

import threading
from collections.abc import Callable

import torch

from bft_kernels import _cpu


class Blocks:
    """Tells which block comes next. A block is a part of the rows and a step of the vocabulary.

    A part's steps are taken in their order, one at a time. No part is ``reach`` steps or more ahead
    of another, so that data that the parts of a step share is needed for ``reach`` steps only. The
    results do not depend on which thread computes a block, or when.

    Args:
        parts, steps: the number of parts and of steps.
        reach: see above.
        in_turn: whether the parts go through each step one after the other, for sums over rows.
    """

    def __init__(self, parts: int, steps: int, reach: int, *, in_turn: bool = False) -> None:
        self.parts, self.steps = parts, steps
        self.reach, self.in_turn = reach, in_turn
        self._step = [0] * parts  # for each part its next step, or the one that is being computed
        self._idle = set(range(parts if steps else 0))
        self._ended = False
        self._changed = threading.Condition()

    def take(self) -> tuple[int, int] | None:
        """A part and its step. Nobody else gets that part before the step is done.

        Waits for one if need be. ``None`` says that there is none left to take: all blocks are
        done, or are with threads that will finish them.
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
        """Marks the step of ``part`` that a thread took as done."""
        with self._changed:
            self._step[part] += 1
            if self._step[part] < self.steps:
                self._idle.add(part)
            self._changed.notify_all()

    def end(self) -> None:
        """Gives out no more blocks."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def run(blocks: Blocks, compute: Callable[[int, int, int], None], threads: int) -> None:
    """Calls ``compute(worker, part, step)`` for every block, on up to ``threads`` threads.

    With ``threads=1`` the caller's thread computes all blocks, and its products and loops may use
    more threads.

    Raises:
        BaseException: the first error of a call. Blocks that nobody has taken by then are left out.
    """
    if threads == 1:
        with torch.inference_mode():
            for step in range(blocks.steps):
                for part in range(blocks.parts):
                    compute(0, part, step)
        return

    def work(worker: int) -> None:
        # Each thread has its own mode, and nothing that is computed here needs a gradient.
        try:
            with torch.inference_mode():
                while taken := blocks.take():
                    compute(worker, *taken)
                    blocks.done(taken[0])
        except BaseException:
            blocks.end()
            raise

    _cpu.run_team(work, threads)

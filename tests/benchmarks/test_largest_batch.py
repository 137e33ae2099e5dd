"""The search for the largest batch, among steps whose memory is made up."""

import pytest

from benchmarks.measure.largest_batch import largest_batch, next_batch
from benchmarks.measure.train_step import Outcome


class Machine:
    """Steps whose peak is a bent line in the batch; counts those that are run."""

    def __init__(self, limit, floor=2000, each=130, slow=10**9):
        self.limit, self.floor, self.each, self.slow = limit, floor, each, slow
        self.ran = []

    def peak(self, batch):
        # A little noise, not monotone.
        return max(self.floor, 1000 + self.each * batch) + batch * 37 % 11

    def __call__(self, batch):
        self.ran.append(batch)
        if batch >= self.slow:
            return Outcome("slow", reason="took longer than 9 s")
        over = self.peak(batch) > self.limit
        return Outcome("over") if over else Outcome("fits", self.peak(batch))


@pytest.mark.parametrize("limit", [1999, 2011, 2200, 3000, 5000, 40_000, 150_000])
def test_the_largest_batch_was_run_and_so_was_the_next(limit):
    machine = Machine(limit)
    batch, note = largest_batch(limit, 10_000, machine, {})
    assert batch == 0 or (batch in machine.ran and machine.peak(batch) <= limit)
    fails = int(note.split()[0])
    assert note == f"{fails} did not fit"
    assert fails in machine.ran
    assert machine.peak(fails) > limit
    assert batch < fails <= next_batch(batch)
    assert len(machine.ran) <= 17


def test_larger_limits_go_on_from_smaller_ones():
    peaks, batch = {}, 0
    for limit in (4000, 8000, 16_000):
        machine, smaller = Machine(limit), batch
        batch, _ = largest_batch(limit, 10_000, machine, peaks)
        assert min(machine.ran) > smaller


def test_a_search_ends_at_the_cap_and_at_a_slow_step():
    machine = Machine(10**9)
    assert largest_batch(10**9, 100, machine, {})[0] == 100
    assert machine.ran[-1] == 100
    batch, note = largest_batch(10**9, 100, Machine(10**9, slow=20), {})
    assert (batch, note) == (16, "at least; 32: took longer than 9 s")


def test_steps_of_batches():
    assert [next_batch(b) for b in (0, 1, 15, 16, 100)] == [1, 2, 16, 17, 105]

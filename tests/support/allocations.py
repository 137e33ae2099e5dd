"""What a call asks of torch's allocator."""

from dataclasses import dataclass, field

import torch


@dataclass
class Allocations:
    """What a call asked of torch's CPU allocator, inside torch's own kernels too."""

    largest: int = 0  # bytes of the largest single block
    peak: int = 0  # bytes of all blocks alive at once, beyond those alive before
    sizes: list[int] = field(default_factory=list)


def measure_allocations(run):
    """Runs a function and reports its allocations; what it returns counts as alive."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        held = run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    events = sorted(events, key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    del held
    result, alive = Allocations(), 0
    for change in changes:
        alive += change
        result.peak = max(result.peak, alive)
        if change > 0:
            result.sizes.append(change)
    result.largest = max(result.sizes, default=0)
    return result

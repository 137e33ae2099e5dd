"""How many kernels of ours a step launches, and how many of torch's operators it calls: counted.

Counted is a loss with its backward, in one chunk, with the head and a bias trained: between two
GEMMs the host should have little to do. Operators that only look at a tensor do not count.
"""

import pytest

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy
from bft_kernels.backends.common import on_device
from tests.support.meta_device import put_under

STEPS = {
    "exact": linear_cross_entropy,
    "sampled": lambda **how: linear_cross_entropy(gradient="sampled", **how),
    "weighted": balanced_linear_cross_entropy,
}
# Launches and operators, by backend and engine. Fewer are welcome.
MOST = {
    "triton-chunks": {"exact": (2, 55), "sampled": (9, 98), "weighted": (5, 82)},
    "triton-tiles": {"exact": (2, 55), "sampled": (11, 129), "weighted": (5, 82)},
    "cuda-chunks": {"exact": (2, 56), "sampled": (10, 78), "weighted": (3, 83)},
    "cuda-tiles": {"exact": (4, 50), "sampled": (11, 108), "weighted": (5, 76)},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("engine", MOST)
def test_a_step_has_few_launches_and_operators(engine, step, request, monkeypatch):
    backend, _, forward = engine.partition("-")
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: forward == "chunks")
    device = put_under(backend, request, monkeypatch)
    given = device.problem((3, 8))
    work = device.run(lambda: STEPS[step](**given))
    launches, operators = MOST[engine][step]
    assert 0 < device.launched <= launches
    assert work.operators.total() <= operators, work.operators

"""How many kernels of ours a step launches, and how many of torch's operators it calls, and the
bytes that these read and write: counted.

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
# Launches, operators and their kilobytes, by backend and engine. Fewer are welcome.
MOST = {
    "triton-chunks": {"exact": (2, 51, 310), "sampled": (9, 98, 780), "weighted": (5, 79, 310)},
    "triton-tiles": {"exact": (2, 51, 310), "sampled": (11, 129, 700), "weighted": (5, 79, 310)},
    "cuda-chunks": {"exact": (2, 52, 310), "sampled": (10, 78, 570), "weighted": (3, 80, 320)},
    "cuda-tiles": {"exact": (4, 46, 90), "sampled": (11, 108, 500), "weighted": (5, 73, 90)},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("engine", MOST)
def test_a_step_leaves_little_to_the_host(engine, step, request, monkeypatch):
    backend, _, forward = engine.partition("-")
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: forward == "chunks")
    device = put_under(backend, request, monkeypatch)
    given = device.problem((3, 8))
    work = device.run(lambda: STEPS[step](**given))
    launches, operators, kilobytes = MOST[engine][step]
    assert 0 < device.launched <= launches
    assert work.operators.total() <= operators, work.operators
    assert 0 < work.bytes <= 1000 * kilobytes

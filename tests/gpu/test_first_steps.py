"""What must work before anything else on a GPU is worth a look, in this order.

One sampled step, a step in a CUDA graph, a step without waiting for the device, and the hash of the
sampling. One size and one type, so that few kernels are compiled. On a CPU Triton's interpreter
runs the same, except the line that captures.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll
from bft_kernels.backends.common import on_device
from tests.support.draws import Program, region_bits, uniform

pytestmark = pytest.mark.slow  # in the interpreter

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}
ROWS, WIDTH, VOCABULARY = (130, 64, 1000) if HAS_GPU else (4, 16, 40)
Step = Callable[..., Tensor]  # the loss of hidden, weight, target and boundaries
STEPS = {
    "sampled": lambda h, w, t, b, **how: linear_cross_entropy(h, w, t, **SAMPLED, **how),
    "exact": lambda h, w, t, b, **how: linear_cross_entropy(h, w, t, **how),
    "nll": lambda h, w, t, b, **how: linear_nll(h, w, t, **how).sum(),
    "balanced": lambda h, w, t, b, **how: balanced_linear_cross_entropy(
        h, w, t, cu_seqlens=b, window=4, **how
    ),
    "balanced, sampled": lambda h, w, t, b, **how: balanced_linear_cross_entropy(
        h, w, t, cu_seqlens=b, window=4, return_stats=True, **SAMPLED, **how
    )[0],
}


@pytest.fixture(params=["triton-chunks", "triton-tiles", "cuda-chunks", "cuda-tiles"])
def backend(request, monkeypatch):
    """Each backend, in chunks of logits and in tiles."""
    name, _, forward = request.param.partition("-")
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: forward == "chunks")
    if name == "triton":
        pytest.importorskip("triton")
    elif not HAS_GPU:
        pytest.skip("needs a GPU; the emulation has tests of its own")
    return name


def inputs(seed):
    """Leaves, targets and boundaries on the device, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) * WIDTH**-0.5
    target = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    target[::5] = -100
    bounds = torch.tensor([0, ROWS // 3, ROWS])
    leaves = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in (hidden, weight))
    return *leaves, target.to(DEVICE), bounds.to(DEVICE)


def run(step, given, **how):
    """The loss and both gradients, made anew."""
    given[0].grad = given[1].grad = None
    loss = step(*given, **how)
    loss.backward()
    return [loss.detach(), given[0].grad, given[1].grad]


def captured(what):
    """What runs it again on the same memory, and where its results then are."""
    made = []
    if not HAS_GPU:
        return lambda: made.__setitem__(slice(None), what()), lambda: made
    side = torch.cuda.Stream()  # a graph wants everything compiled and allocated before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        what()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made += what()
    return graph.replay, lambda: made


@contextlib.contextmanager
def no_waiting():
    """Whatever waits for the device raises."""
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_values_of_the_torch_backend(backend, name):
    given = inputs(0)
    parts = zip(
        ("loss", "dH", "dW"),
        run(STEPS[name], given, backend=backend),
        run(STEPS[name], given, backend="torch"),
        strict=True,
    )
    for part, got, expected in parts:
        difference = (got.double() - expected.double()).norm() / expected.double().norm()
        assert float(difference) < (1e-4 if part == "loss" else 0.03), part


@pytest.mark.parametrize("name", STEPS)
def test_a_graph_replays_what_the_inputs_have_become(backend, name):
    given = inputs(0)
    replay, results = captured(lambda: run(STEPS[name], given, backend=backend))
    for seed in (1, 2):
        fresh = inputs(seed)
        with torch.no_grad():
            for old, new in zip(given, fresh, strict=True):
                old.copy_(new)
        replay()
        got = [part.clone() for part in results()]
        expected = run(STEPS[name], fresh, backend=backend)
        for part, one, other in zip(("loss", "dH", "dW"), got, expected, strict=True):
            assert torch.equal(one, other), f"{part}, inputs {seed}"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_device(backend, name):
    given = inputs(0)
    run(STEPS[name], given, backend=backend)  # compiles
    with no_waiting():
        got = run(STEPS[name], given, backend=backend)
    assert all(bool(part.isfinite().all()) for part in got)


REGIONS = [(-5, 2**40, 5, 2**32 - 21, 21), (2**63 - 1, 3, 9, 2**31 - 8, 17), (0, 0, 4, 0, 16)]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("engine", ["triton", "cuda"])
def test_the_hash_has_the_bits_of_the_definition(engine, region, tmp_path):
    if engine == "triton":
        pytest.importorskip("triton")
        script = Path(__file__).parents[1] / "support" / "triton_draws.py"
        made = tmp_path / "draws.npz"
        environment = os.environ | ({} if HAS_GPU else {"TRITON_INTERPRET": "1"})
        command = [sys.executable, script, *map(str, region), made]
        subprocess.run(command, env=environment, check=True)
        bits, drawn = np.load(made)["bits"], np.load(made)["u"]
    elif not HAS_GPU:
        pytest.skip("needs a GPU; the emulation has tests of its own")
    elif shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    else:
        bits, drawn = Program(tmp_path, "nvcc", "-arch=native", "-x", "cu")(*region)
    np.testing.assert_array_equal(bits, region_bits(*region))
    np.testing.assert_array_equal(drawn, uniform(bits))

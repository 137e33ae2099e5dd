"""``warm_up`` compiles all that a step launches, and nothing where nothing is to be compiled.

For sm_90, which is not here, in a process of its own: tests interpret the kernels.
"""

import os
import subprocess
import sys

import pytest
import torch

from bft_kernels import warm_up

pytest.importorskip("triton", reason="triton is not installed")

STEP = """
import contextlib, sys
import torch
from triton import knobs, runtime
from benchmarks.measure.compiled import TARGETS, _no_device
from bft_kernels import autograd, dispatch, ops
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, warm_up
from bft_kernels.backends.triton import engine
from tests.support.meta_device import FromHost, HostWork

how, balanced = eval(sys.argv[1])
compiled = []
runtime.driver.set_active(_no_device(TARGETS["sm_90"]))
knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
dispatch.try_out = lambda *_: ""
torch.autocast = lambda *_, **__: contextlib.nullcontext()
ops.select = lambda *_: engine
ops.offered = autograd.offered = lambda name, *_: getattr(engine, name)
how = {"max_buffer_bytes": 2**22, "backend": "triton"} | how
warm_up(64, 512, tokens=256, balanced=balanced, bias=True, **how)
assert compiled, "nothing was compiled"
print(len(compiled), sorted(set(compiled)))

def tensor(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

hidden, weight, bias = tensor(4, 64, 64), tensor(512, 64), tensor(512)
target = torch.empty(4, 64, dtype=torch.int64, device="meta")
loss = balanced_linear_cross_entropy if balanced else linear_cross_entropy
before = len(compiled)
with engine.compiling(torch.device("cuda")), HostWork(), FromHost():
    for _ in range(2):  # the second adds to the gradients of the first
        loss(hidden, weight, target, bias=bias, **how).sum().backward()
assert compiled[before:] == [], compiled[before:]
"""


@pytest.mark.parametrize(
    ("how", "balanced"),
    [
        ({}, True),
        pytest.param({"gradient": "sampled"}, True, marks=pytest.mark.slow),
        pytest.param({"reduction": "none"}, False, marks=pytest.mark.slow),
    ],
    ids=["exact", "sampled", "recompute"],
)
def test_a_step_after_it_compiles_nothing(how, balanced):
    command = [sys.executable, "-c", STEP, repr((how, balanced))]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run(command, env=environment, check=True)


def test_a_backend_without_a_compiler_returns_at_once():
    assert warm_up(64, 512, tokens=8, device="cpu", backend="torch") is None


def test_options_are_those_of_the_loss():
    with pytest.raises(ValueError, match="eps"):
        warm_up(64, 512, tokens=8, device="cpu", dtype=torch.float32, eps=2.0)
    with pytest.raises(TypeError, match="sofcap"):
        warm_up(64, 512, tokens=8, device="cpu", sofcap=3.0)

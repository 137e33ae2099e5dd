"""``warm_up`` compiles all that a step launches, and nothing where nothing is to be compiled.

For sm_90, which is not here, in a process of its own: tests interpret the kernels.
"""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from bft_kernels import warm_up
from bft_kernels.backends.torch import engine

pytest.importorskip("triton", reason="triton is not installed")

STEP = """
import contextlib, sys
from types import SimpleNamespace
import torch
from triton import knobs, runtime
from benchmarks.measure.compiled import TARGETS, _no_device
from bft_kernels import autograd, dispatch, functional, ops, problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, warm_up
from bft_kernels.backends.triton import engine
from tests.support.meta_device import FromHost, HostWork

how, of_step, of_warm_up = map(eval, sys.argv[1:])
compiled = []
runtime.driver.set_active(_no_device(TARGETS["sm_90"]))
knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
dispatch.try_out = lambda *_: ""
torch.autocast = lambda *_, **__: contextlib.nullcontext()
ops.select = lambda *_: engine
ops.offered = autograd.offered = lambda name, *_: getattr(engine, name)
# The weights of a scheme of one's own are read on the host, and there are no values.
functional.balanced_loss = lambda nll, *_: SimpleNamespace(loss=(nll * nll.detach()).sum())
how = {"max_buffer_bytes": 2**22, "backend": "triton"} | how
autocast = of_warm_up.pop("autocast", False)
torch.set_autocast_dtype("cuda", torch.bfloat16)
torch.set_autocast_enabled("cuda", autocast)
warm_up(64, 512, tokens=256, bias=True, **how, **of_warm_up)
torch.set_autocast_enabled("cuda", False)
if autocast:  # tensors without values never see it
    problem._operand = lambda *_: torch.bfloat16
assert compiled, "nothing was compiled"
print(len(compiled), sorted(set(compiled)))

def tensor(*shape, dtype=torch.int64, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

dtype, train_head = of_warm_up.get("dtype", torch.bfloat16), of_warm_up.get("train_head", True)
stored = of_warm_up.get("weight_dtype", dtype)
hidden, target = tensor(4, 64, 64, dtype=dtype, grad=True), tensor(4, 64)
weight, bias = (tensor(*shape, dtype=stored, grad=train_head) for shape in ((512, 64), (512,)))
balanced = of_warm_up.get("balanced", False)
loss = balanced_linear_cross_entropy if balanced else linear_cross_entropy
of_step = {name: tensor(*shape, **of) for name, (shape, of) in of_step.items()}
before = len(compiled)
with engine.compiling(torch.device("cuda")), HostWork(), FromHost():
    for _ in range(2):  # the second adds to the gradients of the first
        made = loss(hidden, weight, target, bias=bias, **how, **of_step)
        (made[0] if how.get("return_stats") else made).sum().backward()
assert compiled[before:] == [], compiled[before:]
"""


# Options of the loss, tensors that the step has besides, and what else `warm_up` is told.
CASES = {
    "exact": ("{}", "{}", "{'balanced': True}"),
    "boundaries on the device": ("{}", "{'cu_seqlens': ((5,), {})}", "{'balanced': True}"),
    "items on the device": (
        "{}",
        "{'cu_seqlens': ((5,), {}), 'num_items': ((), {})}",
        "{'balanced': True}",
    ),
    "a scheme of one's own": ("{'scheme': print}", "{}", "{'balanced': True}"),
    "dft, statistics": ("{'scheme': 'dft', 'return_stats': True}", "{}", "{'balanced': True}"),
    "sampled": ("{'gradient': 'sampled'}", "{}", "{'balanced': True}"),
    "recompute": ("{'reduction': 'none'}", "{}", "{}"),
    "frozen head": ("{}", "{}", "{'balanced': True, 'train_head': False}"),
    "two types": ("{'reduction': 'none'}", "{}", "{'weight_dtype': torch.float32}"),
    "autocast": ("{'reduction': 'none'}", "{}", "{'dtype': torch.float32, 'autocast': True}"),
}


MARKS = {case: [pytest.mark.soak] for case in CASES} | {
    "exact": [],
    "boundaries on the device": [pytest.mark.slow],
    "sampled": [pytest.mark.slow],
}


@pytest.mark.parametrize("case", [pytest.param(x, marks=MARKS[x]) for x in CASES])
def test_a_step_after_it_compiles_nothing(case):
    command = [sys.executable, "-c", STEP, *CASES[case]]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run(command, env=environment, check=True)


def test_a_backend_without_a_compiler_returns_at_once(monkeypatch):
    called = Mock()
    for name in ("linear_nll", "weighted_loss", "linear_nll_backward"):
        monkeypatch.setattr(engine, name, called)
    warm_up(64, 512, tokens=8, device="cpu", backend="torch")
    warm_up(64, 512, tokens=8, device="cpu", backend="torch", reduction="none")
    called.assert_not_called()


def test_options_are_those_of_the_loss():
    with pytest.raises(ValueError, match="eps"):
        warm_up(64, 512, tokens=8, device="cpu", dtype=torch.float32, eps=2.0)
    with pytest.raises(TypeError, match="sofcap"):
        warm_up(64, 512, tokens=8, device="cpu", sofcap=3.0)

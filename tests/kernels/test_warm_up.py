"""``warm_up`` compiles all that a step launches, and nothing where nothing is to be compiled. How
many kernels that is, is counted.

For sm_90, which is not here, in a process of its own: tests interpret the kernels.
"""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from bft_kernels import warm_up
from bft_kernels.backends.torch import engine

pytest.importorskip("triton", reason="triton is not installed")

SM_90 = """
import contextlib, json, sys
from types import SimpleNamespace
import torch
from triton import knobs, runtime
from benchmarks.measure.compiled import TARGETS, _no_device
from bft_kernels import autograd, dispatch, functional, ops, problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, warm_up
from bft_kernels.backends.triton import engine
from tests.support.meta_device import FromHost, HostWork

runtime.driver.set_active(_no_device(TARGETS["sm_90"]))
dispatch.try_out = lambda *_: ""
torch.autocast = lambda *_, **__: contextlib.nullcontext()
ops.select = lambda *_: engine
ops.offered = autograd.offered = lambda name, *_: getattr(engine, name)

def tensor(*shape, dtype=torch.int64, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
"""

STEP = """
how, of_step, of_warm_up = map(eval, sys.argv[1:])
compiled = []
knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
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

# A step of 8192 tokens and the next one, which adds to its gradients: kernels that they need.
COUNT = """
found, kernels = {}, set()
# What it returns keeps them from being compiled.
knobs.runtime.jit_cache_hook = lambda **given: not kernels.add((given["fn"].name, given["key"]))
for case, (name, budget, train_head, how) in json.loads(sys.argv[1]).items():
    kernels.clear()
    hidden = tensor(8, 1024, 4096, dtype=torch.bfloat16, grad=True)
    weight = tensor(131072, 4096, dtype=torch.bfloat16, grad=train_head)
    with HostWork(), FromHost():
        for _ in range(2):
            loss = balanced_linear_cross_entropy if name == "balanced" else linear_cross_entropy
            how |= {"backend": "triton", "max_buffer_bytes": budget}
            loss(hidden, weight, tensor(8, 1024), **how).sum().backward()
            found.setdefault(case, []).append(len(kernels))
print(json.dumps(found))
"""
CHUNKS, TILES = 528 * 2**20, 100 * 2**20
SAMPLED = {"gradient": "sampled"}
# The first step's kernels, and with the second's; fewer are welcome.
KERNELS = {
    "balanced, sampled, chunks": (("balanced", CHUNKS, True, SAMPLED), [13, 13]),
    "balanced, sampled, tiles": (("balanced", TILES, True, SAMPLED), [15, 15]),
    "balanced, exact": (("balanced", TILES, True, {}), [6, 6]),
    "balanced, frozen head": (("balanced", TILES, False, {}), [5, 5]),
    "mean, sampled, chunks": (("mean", CHUNKS, True, SAMPLED), [10, 10]),
    "mean, sampled, tiles": (("mean", TILES, True, SAMPLED), [12, 12]),
    "none, chunks": (("mean", CHUNKS, True, {"reduction": "none"}), [5, 6]),
    "none, tiles": (("mean", TILES, True, {"reduction": "none"}), [6, 7]),
    "mean, exact": (("mean", CHUNKS, True, {}), [3, 3]),
    "mean, frozen head": (("mean", CHUNKS, False, {}), [2, 2]),
}


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


def on_sm_90(code, *arguments):
    """Runs it in a process of its own; gives what it printed."""
    command, environment = [sys.executable, "-c", SM_90 + code, *arguments], os.environ.copy()
    environment["TRITON_INTERPRET"] = "0"
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout


@pytest.mark.parametrize("case", [pytest.param(x, marks=MARKS[x]) for x in CASES])
def test_a_step_after_it_compiles_nothing(case):
    on_sm_90(STEP, *CASES[case])


def test_how_many_kernels_the_first_step_compiles():
    steps = {case: how for case, (how, _) in KERNELS.items()}
    found = json.loads(on_sm_90(COUNT, json.dumps(steps)))
    for case, (_, (first, both)) in KERNELS.items():
        assert 0 < found[case][0] <= first, case
        assert found[case][1] <= both, case


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

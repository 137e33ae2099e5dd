"""Torch's default device and type are the caller's: no number here may depend on them."""

import ast
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bft_kernels import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    reference,
    token_weights,
    weighting,
    workspace,
)
from bft_kernels.settings import SCHEMES
from tests.support.problems import draw_problem

ROOT = Path(__file__).parents[2]
# `meta` stands for any device that the tensors are not on: what is made there has no values.
DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]
FLOATS = [torch.float32, torch.bfloat16, torch.float64]
SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}
CALLS = {
    "nll": linear_nll,
    "mean": linear_cross_entropy,
    "sum": lambda *args, **how: linear_cross_entropy(
        *args, reduction="sum", label_smoothing=0.1, z_loss=0.01, softcap=9.0, **how
    ),
    "balanced": lambda *args, **how: balanced_linear_cross_entropy(*args, window=4, **how),
    "rows": lambda h, w, t, **how: balanced_linear_cross_entropy(
        h.view(4, -1, h.shape[1]), w, t.view(4, -1), scheme="bft-v1-code", num_items=5, **how
    ),
    "sampled": lambda *args, **how: linear_nll(*args, **SAMPLED, hidden_variance=True, **how),
    "balanced sampled": lambda *args, **how: balanced_linear_cross_entropy(
        *args, scheme="bft-v1", normalize="token", **SAMPLED, **how
    ),
}


@contextmanager
def default(*defaults):
    """A default type or device or both, for a while."""
    before = torch.get_default_dtype()
    for what in defaults:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def tensors(value):
    """All tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value or () for x in tensors(part)]


def results(call, p, **how):
    """The loss, its statistics and its gradients."""
    own = p.copy()
    loss, stats = call(*own.args, bias=own.bias, return_stats=True, **how)
    leaves = list(own.leaves.values())
    # Made on the CPU: what the test itself makes is not what it is about.
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.5)) if leaves else ()
    return tensors([loss.detach(), stats, grads])


def check_same(run, *defaults):
    """A result is the same to the bit under other defaults."""
    want = run()
    with default(*defaults):
        got = run()
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden", "weight", "bias")], ids=len)
@pytest.mark.parametrize(
    ("backend", "dtype"), [*product(["cpu"], FLOATS[:2]), *product(["torch"], FLOATS)], ids=str
)
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_defaults(name, backend, dtype, frozen):
    p = draw_problem(24, 8, 70, bias=True, dtype=dtype, frozen=frozen)
    for what in DEFAULTS:
        workspace.empty_cache()
        check_same(lambda: results(CALLS[name], p, backend=backend), what)


@pytest.mark.parametrize("name", ["mean", "balanced", "sampled"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_results_of_kernels_do_not_depend_on_defaults(backend, name, request):
    if torch.cuda.is_available():
        pytest.skip("the interpreter and the emulation stand in for a GPU")
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    else:
        request.getfixturevalue("emulated_device")
    p = draw_problem(3, 8, 40, bias=True, dtype=torch.float32)
    check_same(lambda: results(CALLS[name], p, backend=backend), torch.float64, "meta")


def seed_from_the_generator():
    p = draw_problem(12, 8, 60)

    def run():
        torch.manual_seed(3)
        return results(linear_nll, p, gradient="sampled", eps=2**-4)

    return run


def weights_and_layouts():
    confidence, cu_seqlens = torch.rand(12), torch.tensor([0, 5, 5, 12])
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    labels = torch.randint(9, (2, 6))

    def run():
        weights = [token_weights(confidence, cu_seqlens, scheme=s, window=3) for s in SCHEMES]
        layouts = [
            weighting.cu_seqlens_from_position_ids(positions),
            weighting.cu_seqlens_from_attention_mask(positions),
            weighting.shift_labels(labels, cu_seqlens),
        ]
        return tensors(weights + layouts)

    return run


def specification():
    p = draw_problem(6, 4, 20, ignored=0.0, frozen=("hidden", "weight"))
    cu_seqlens = torch.tensor([0, 2, 6])

    def run():
        sampled = reference.sampled_gradient(*p.args, 7, eps=2**-4)
        loss = reference.balanced_linear_cross_entropy(*p.args, cu_seqlens, window=2)
        return tensors([vars(sampled).values(), loss, reference.linear_nll(*p.args)])

    return run


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("of", [seed_from_the_generator, weights_and_layouts, specification])
def test_nothing_else_depends_on_defaults(of, what):
    check_same(of(), what)


MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones"}
MAKERS |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}


def test_every_tensor_is_made_with_a_type_and_a_device():
    """The call would be right only where the defaults are torch's own."""
    wrong = []
    files = sorted(file for name in ("bft_kernels", "bft") for file in (ROOT / name).rglob("*.py"))
    assert len(files) > 80
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            made = ast.unparse(node.func)
            given = {keyword.arg for keyword in node.keywords}
            if made in {f"torch.{name}" for name in MAKERS} and not {"dtype", "device"} <= given:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {made}")
    assert not wrong, "dtype= and device= are missing:\n" + "\n".join(wrong)

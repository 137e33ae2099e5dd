"""Class weights: torch's cross-entropy and the specification, in every combination of options."""

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from bft_kernels import LinearCrossEntropyLoss, linear_cross_entropy, reference
from tests.kernels.test_functional import SHAPES
from tests.support.problems import assert_close, draw_problem, error_of
from tests.support.soak import soaked

OPTIONS = [
    {},
    {"softcap": 3.0, "temperature": 1.3},
    {"z_loss": 1e-2, "softcap": 3.0},
    {"label_smoothing": 0.2, "temperature": 0.7},
    {"label_smoothing": 1.0, "z_loss": 1e-2},
    {"label_smoothing": 0.2, "softcap": 3.0, "temperature": 0.7, "z_loss": 1e-2},
]
FROZEN = [(), ("weight", "bias"), ("hidden",)]


def weights(p):
    """One of them 0, and not all positive."""
    w = torch.randn(p.weight.shape[0], dtype=torch.float64) + 1
    w[0] = 0
    return w


def specified(p, w, *, reduction, token_weight=None, num_items=None, **how):
    token = reference.linear_nll(*p.args, bias=p.bias, class_weight=w, **how)
    each = token if token_weight is None else token * token_weight
    if reduction == "none":
        return each
    divisor = w[p.target[p.labelled]].sum() if num_items is None else num_items
    return each.sum() / (divisor if reduction == "mean" and divisor != 0 else 1)


@pytest.mark.parametrize(
    ("options", "reduction", "bias"),
    soaked(OPTIONS, ["mean", "sum", "none"], [True, False], plain=lambda *case: case[2]),
    ids=str,
)
def test_the_loss_is_the_specification_s(options, reduction, bias, poison):
    for place, shape in enumerate(SHAPES):
        rows, width, vocabulary, ignored = shape
        frozen = FROZEN[place % len(FROZEN)]
        p = draw_problem(rows, width, vocabulary, ignored=ignored, bias=bias, frozen=frozen)
        q, w = p.copy(), weights(p)
        how = {"reduction": reduction, **options}
        if place % 2:
            how["token_weight"] = torch.randn(rows, dtype=torch.float64)
        if place % 3 == 0 and reduction == "mean":
            how["num_items"] = 2.5
        loss = linear_cross_entropy(*p.args, bias=p.bias, class_weight=w, **how)
        want = specified(q, w, **how)
        assert_close(loss, want, 1e-11, f"{shape}")
        upstream = torch.randn_like(want)
        got = p.gradients((loss * upstream).sum())
        assert_close(got, q.gradients((want * upstream).sum()), 1e-11, f"{shape} {frozen}")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_torch_s(reduction, label_smoothing):
    p = draw_problem(40, 6, 31, bias=True)
    q, w, how = p.copy(), weights(p).abs(), {"label_smoothing": label_smoothing}
    want = cross_entropy(q.hidden @ q.weight.T + q.bias, q.target, w, reduction=reduction, **how)
    loss = linear_cross_entropy(*p.args, bias=p.bias, class_weight=w, reduction=reduction, **how)
    assert_close(loss, want)
    assert_close(p.gradients(loss.sum()), q.gradients(want.sum()))


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_a_shift_and_a_module(gradient):
    p, options = draw_problem(24, 6, 31, ignored=0.0), {"gradient": gradient, "eps": 2**-20}
    w, hidden, labels = weights(p), p.hidden.view(3, 8, 6), p.target.view(3, 8)
    got = LinearCrossEntropyLoss(shift=True, **options)(
        hidden, p.weight, labels, class_weight=w, seed=1
    )
    p.target = pad(labels[:, 1:], (0, 1), value=-100).flatten()
    want = specified(p, w, reduction="mean")
    assert_close(got, want)
    assert_close(p.gradients(got), p.gradients(want), 1e-11 if gradient == "exact" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[2:4], OPTIONS[5]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_errors_are_those_of_plain_torch(backend, options, dtype):
    p = draw_problem(200, 24, 300, bias=True, dtype=dtype, scale=2.0)
    exact, plain, w = p.copy(torch.float64), p.copy(), weights(p)
    how = {"reduction": "mean", **options}
    want, eager = (x.gradients(specified(x, w, **how)) for x in (exact, plain))
    p.hidden.data[~p.labelled] = torch.nan  # ignored rows may hold anything
    loss = linear_cross_entropy(*p.args, bias=p.bias, class_weight=w, backend=backend, **options)
    # With all three the gradient is a sum of two, each of them rounded.
    factor = 4.0 if {"label_smoothing", "softcap"} <= options.keys() else 2.5
    for name, gradient in p.gradients(loss).items():
        bound = max(torch.finfo(dtype).eps, factor * error_of(eager[name], want[name]))
        assert error_of(gradient, want[name]) < bound, name


def test_autocast_narrows_nothing_else():
    """Than the operands of products, as in the backends."""
    p = draw_problem(40, 24, 50, bias=True, dtype=torch.float32)
    q, w, how = p.copy(torch.float64), weights(p), {"label_smoothing": 0.2}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*p.args, bias=p.bias, class_weight=w, **how)
    for name in ("hidden", "weight"):
        getattr(q, name).data = getattr(p, name).data.bfloat16().double()
    want = specified(q, w, reduction="mean", **how)
    assert_close(loss, want, 1e-6)
    assert_close(p.gradients(loss), q.gradients(want), 2**-8)

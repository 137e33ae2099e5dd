"""The public functions in float64 against the specification: values, statistics, gradients."""

import math

import pytest
import torch

from bft_kernels import TokenStats, linear_nll, reference
from tests.support.losses import assert_same_loss, balanced, cross_entropy, nll, specified_nll
from tests.support.problems import FROZEN, assert_close, draw_problem

pytestmark = pytest.mark.usefixtures("poison")

# N, D, V and the share of ignored tokens: one of everything, odd and ragged, no rows, no labels.
SHAPES = [
    (1, 1, 1, 0.0),
    (1, 5, 2, 0.0),
    (7, 3, 5, 0.3),
    (19, 6, 33, 0.5),
    (21, 9, 70, 0.0),
    (40, 8, 300, 0.9),
    (0, 4, 9, 0.0),
    (5, 4, 9, 1.0),
]
# Bytes. One byte asks for blocks of one row and one column, 700 for a few of each.
BUDGETS = [1, 700, 9000, None]
OPTIONS = [
    {},
    {"bias": True},
    {"softcap": 2.0},
    {"temperature": 0.6},
    {"bias": True, "softcap": 5.0, "temperature": 1.7},
]
LOSS_OPTIONS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"bias": True, "softcap": 4.0, "temperature": 0.8, "label_smoothing": 0.3, "z_loss": 0.1},
    {"label_smoothing": 1.0},
]


def drawn(shape, options, **how):
    """A problem, and the options of its loss."""
    rows, width, vocabulary, ignored = shape
    options = dict(options)
    bias = options.pop("bias", False)
    return draw_problem(rows, width, vocabulary, ignored=ignored, bias=bias, **how), options


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_statistics_and_gradients(shape, options, budget):
    p, how = drawn(shape, options)
    loss, stats = nll(p, max_buffer_bytes=budget, return_stats=True, **how)
    assert isinstance(stats, TokenStats)
    assert loss.dtype == torch.float64
    exact, own = specified_nll(p, **how), p.of_labelled()
    assert_close(loss, exact, 1e-12)
    for name, value in reference.token_stats(*own.args, bias=own.bias, **how).items():
        got = getattr(stats, name)
        assert_close(got[p.labelled], value, 1e-12, name)
        assert not got.requires_grad
        assert bool((got[~p.labelled] == 0).all()), name
    assert stats.variance is stats.hidden_variance is None
    upstream = torch.randn(shape[0], dtype=torch.float64)
    assert_same_loss(p, (upstream * loss).sum(), (upstream * exact).sum())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [*OPTIONS, *LOSS_OPTIONS], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy(reduction, options, budget):
    for shape in SHAPES:
        p, how = drawn(shape, options)
        token, count = specified_nll(p, **how), p.labelled.sum().clamp_min(1)
        for factor in (None, torch.rand(shape[0], dtype=torch.float64)):
            each = token if factor is None else token * factor
            expected = {"none": each, "sum": each.sum(), "mean": each.sum() / count}[reduction]
            how |= {"reduction": reduction, "token_weight": factor, "max_buffer_bytes": budget}
            got = cross_entropy(p, **how)
            assert_close(got, expected, 1e-12)
            upstream = torch.randn((), dtype=torch.float64)
            assert_same_loss(p, (got * upstream).sum(), (expected * upstream).sum())


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("shape", [(13, 6, 33, 0.5), (0, 4, 9, 0.0), (5, 4, 9, 1.0)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_frozen_inputs(frozen, shape, softcap):
    p, _ = drawn(shape, {"bias": True}, frozen=frozen)
    upstream, count = torch.randn(shape[0], dtype=torch.float64), p.labelled.sum().clamp_min(1)
    smoothed = {"label_smoothing": 0.2, "z_loss": 0.1}
    exact = specified_nll(p, softcap=softcap)
    smooth = specified_nll(p, softcap=softcap, **smoothed)
    for budget in (1, 3000, None):
        how = {"softcap": softcap, "max_buffer_bytes": budget}
        for loss, expected in (
            ((upstream * nll(p, **how)).sum(), (upstream * exact).sum()),
            (cross_entropy(p, reduction="sum", **how), exact.sum()),
            (cross_entropy(p, **smoothed, **how), smooth.sum() / count),
        ):
            assert_same_loss(p, loss, expected, 1e-11, budget)
    # backward() leaves the frozen ones alone.
    nll(p).sum().backward()
    for name in frozen:
        assert getattr(p, name).grad is None


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_inputs_sampled(frozen, seed):
    p = draw_problem(33, 16, 129, bias=True)
    upstream = torch.randn(33, dtype=torch.float64)

    def run(q):
        return q.gradients((upstream * nll(q, gradient="sampled", eps=2**-5, seed=seed)).sum())

    whole, part = run(p), run(p.copy(frozen=frozen))
    assert_close(part, {name: grad for name, grad in whole.items() if name not in frozen}, 1e-14)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=str)
def test_gradcheck(frozen):
    """Also without an upstream gradient, which the specification's autograd cannot show."""
    p, how = drawn((6, 4, 9, 0.3), OPTIONS[-1], frozen=frozen)

    def weighted(*leaves):
        named = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
        hidden, weight, bias = (named | dict(zip(p.leaves, leaves, strict=True))).values()
        return linear_nll(hidden, weight, p.target, bias=bias, max_buffer_bytes=300, **how)

    assert torch.autograd.gradcheck(weighted, tuple(p.leaves.values()), check_batched_grad=False)


def test_masked_columns():
    # A bias of -inf takes columns out of the vocabulary, as constrained decoding does.
    p = draw_problem(30, 8, 40, bias=True)
    banned, rest = torch.randperm(40).split([15, 25])
    p.bias.data[banned] = -math.inf
    p.target[torch.isin(p.target, banned)] = -100
    place = torch.full((40,), -100).index_copy_(0, rest, torch.arange(25))
    target = torch.where(p.labelled, place[p.target.clamp(min=0)], -100)
    upstream = torch.randn(30, dtype=torch.float64)
    kept = [p.hidden, p.weight[rest], target]
    expected = (upstream * reference.linear_nll(*kept, bias=p.bias[rest])).sum()
    for budget in (1, 2000, None):
        how = {"max_buffer_bytes": budget}
        loss, stats = nll(p, return_stats=True, **how)
        assert_same_loss(p, (upstream * loss).sum(), expected)
        found = linear_nll(*kept, bias=p.bias[rest], return_stats=True)[1]
        for name in ("nll", "lse", "confidence", "entropy", "correct"):
            assert_close(getattr(stats, name), getattr(found, name), 1e-12, name)
        for value in (
            cross_entropy(p, **how),
            balanced(p, window=4, **how),
            nll(p, gradient="sampled", eps=1e-2, **how).sum(),
        ):
            assert bool(torch.isfinite(value))
            for name, grad in p.gradients(value).items():
                assert bool(torch.isfinite(grad).all()), name
                if name != "hidden":
                    assert bool((grad[banned] == 0).all()), name


def test_a_masked_target_costs_infinity():
    # As in torch, and in every path alike; a weight of 0 takes the token out again.
    p = draw_problem(6, 3, 8, bias=True, ignored=0)
    p.bias.data[2] = -math.inf
    p.target[:] = torch.arange(6)
    weight = (p.target != 2).double()
    expected = specified_nll(p).detach()
    assert expected[2] == math.inf
    for frozen in ((), ("weight", "bias"), ("hidden", "weight", "bias")):
        q = p.copy(frozen=frozen)
        assert nll(q)[2] == math.inf
        assert cross_entropy(q, reduction="sum") == math.inf
        rest = cross_entropy(q, reduction="sum", token_weight=weight)
        assert math.isclose(rest.detach(), float(expected[weight > 0].sum()), rel_tol=1e-12)

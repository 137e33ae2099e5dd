"""The public functions in float64 against the specification: values, statistics, gradients."""

import math

import pytest
import torch

from bft_kernels import (
    TokenStats,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    reference,
)
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


def settings(options):
    return {name: value for name, value in options.items() if name != "bias"}


def expected_nll(p, options):
    return reference.linear_nll(*p.args, bias=p.bias, **settings(options))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_statistics_and_gradients(shape, options, budget):
    n, d, v, ignored = shape
    p = draw_problem(n, d, v, ignored=ignored, bias="bias" in options)
    nll, stats = linear_nll(
        *p.args, bias=p.bias, max_buffer_bytes=budget, return_stats=True, **settings(options)
    )
    assert isinstance(stats, TokenStats)
    assert nll.dtype == torch.float64
    exact = expected_nll(p, options)
    assert_close(nll, exact, 1e-12)
    labelled = p.labelled
    expected = reference.token_stats(
        p.hidden[labelled], p.weight, p.target[labelled], bias=p.bias, **settings(options)
    )
    for name, value in expected.items():
        got = getattr(stats, name)
        assert_close(got[labelled], value, 1e-12, name)
        assert not got.requires_grad
        assert bool((got[~labelled] == 0).all()), name
    assert stats.variance is stats.hidden_variance is None
    upstream = torch.randn(n, dtype=torch.float64)
    got = p.gradients((upstream * nll).sum())
    assert_close(got, p.gradients((upstream * exact).sum()), 1e-11)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [*OPTIONS, *LOSS_OPTIONS], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy(reduction, options, budget):
    for n, d, v, ignored in SHAPES:
        p = draw_problem(n, d, v, ignored=ignored, bias="bias" in options)
        weight = torch.rand(n, dtype=torch.float64)
        token = expected_nll(p, options)
        count = max(1, int((p.target != -100).sum()))
        for factor in (None, weight):
            each = token if factor is None else token * factor
            expected = {"none": each, "sum": each.sum(), "mean": each.sum() / count}[reduction]
            got = linear_cross_entropy(
                *p.args,
                bias=p.bias,
                reduction=reduction,
                token_weight=factor,
                max_buffer_bytes=budget,
                **settings(options),
            )
            assert_close(got, expected, 1e-12)
            upstream = torch.randn((), dtype=torch.float64)
            got, expected = (p.gradients((x * upstream).sum(), True) for x in (got, expected))
            assert_close(got, expected, 1e-11)


def test_equals_torch():
    # The drop-in claim itself, without the specification in between.
    p = draw_problem(40, 12, 90, bias=True)
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    for reduction in ("none", "mean", "sum"):
        expected = torch.nn.functional.cross_entropy(
            logits, p.target, reduction=reduction, label_smoothing=0.1
        )
        got = linear_cross_entropy(
            *p.args, bias=p.bias, reduction=reduction, label_smoothing=0.1, ignore_index=-100
        )
        assert_close(got, expected, 1e-12)


def test_confidence_times_loss_is_dft():
    p = draw_problem(40, 12, 90)
    stats = linear_nll(*p.args, return_stats=True)[1]
    loss = linear_cross_entropy(*p.args, token_weight=stats.confidence)
    dft = balanced_linear_cross_entropy(*p.args, scheme="dft", normalize="token")
    assert_close(loss, dft, 1e-12)
    assert_close(p.gradients(loss), p.gradients(dft), 1e-12)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("shape", [(13, 6, 33, 0.5), (0, 4, 9, 0.0), (5, 4, 9, 1.0)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_frozen_inputs(frozen, shape, softcap):
    n, d, v, ignored = shape
    p = draw_problem(n, d, v, ignored=ignored, bias=True, frozen=frozen)
    upstream = torch.randn(n, dtype=torch.float64)
    losses = {
        "nll": lambda **k: (upstream * linear_nll(*p.args, bias=p.bias, **k)).sum(),
        "sum": lambda **k: linear_cross_entropy(*p.args, bias=p.bias, reduction="sum", **k),
        "smooth": lambda **k: linear_cross_entropy(
            *p.args, bias=p.bias, label_smoothing=0.2, z_loss=0.1, **k
        ),
    }
    count = max(1, int((p.target != -100).sum()))
    spec = {"bias": p.bias, "softcap": softcap}
    smooth = reference.linear_nll(*p.args, label_smoothing=0.2, z_loss=0.1, **spec)
    nll = reference.linear_nll(*p.args, **spec)
    expected = {"nll": (upstream * nll).sum(), "sum": nll.sum(), "smooth": smooth.sum() / count}
    for name, make in losses.items():
        for budget in (1, 3000, None):
            loss = make(softcap=softcap, max_buffer_bytes=budget)
            assert_close(loss, expected[name], 1e-11)
            assert_close(
                p.gradients(loss), p.gradients(expected[name], True), 1e-11, f"{name} {budget}"
            )
            for leaf in (p.hidden, p.weight, p.bias):
                assert leaf.grad is None
    # backward() leaves the frozen ones alone.
    losses["nll"]().backward()
    for name in frozen:
        assert getattr(p, name).grad is None


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_inputs_sampled(frozen, seed):
    p = draw_problem(33, 16, 129, bias=True)
    upstream = torch.randn(33, dtype=torch.float64)

    def run(q):
        nll = linear_nll(*q.args, bias=q.bias, gradient="sampled", eps=2**-5, seed=seed)
        return q.gradients((upstream * nll).sum())

    whole, part = run(p), run(p.copy(frozen=frozen))
    assert_close(part, {name: grad for name, grad in whole.items() if name not in frozen}, 1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=str)
def test_gradcheck(options, frozen):
    p = draw_problem(6, 4, 9, bias="bias" in options, frozen=frozen)
    upstream = torch.randn(6, dtype=torch.float64)

    def weighted(*leaves):
        named = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
        named |= dict(zip(p.leaves, leaves, strict=True))
        nll = linear_nll(
            named["hidden"],
            named["weight"],
            p.target,
            bias=named["bias"],
            max_buffer_bytes=300,
            **settings(options),
        )
        # One output each, and a random combination of them.
        return nll, (upstream * nll).sum()

    assert torch.autograd.gradcheck(weighted, tuple(p.leaves.values()), check_batched_grad=False)


def test_masked_columns():
    # A bias of -inf takes columns out of the vocabulary, as constrained decoding does.
    p = draw_problem(30, 8, 40, bias=True)
    banned = torch.randperm(40)[:15]
    with torch.no_grad():
        p.bias[banned] = -math.inf
    p.target[torch.isin(p.target, banned)] = -100
    rest = torch.tensor([v for v in range(40) if v not in banned.tolist()])
    place = torch.full((40,), -100).index_copy_(0, rest, torch.arange(25))
    target = torch.where(p.target == -100, -100, place[p.target.clamp(min=0)])
    upstream = torch.randn(30, dtype=torch.float64)
    kept = [p.hidden, p.weight[rest], target]
    expected = (upstream * reference.linear_nll(*kept, bias=p.bias[rest])).sum()
    for budget in (1, 2000, None):
        nll, stats = linear_nll(*p.args, bias=p.bias, max_buffer_bytes=budget, return_stats=True)
        loss = (upstream * nll).sum()
        assert_close(loss, expected, 1e-12)
        assert_close(p.gradients(loss), p.gradients(expected, True), 1e-11)
        found = linear_nll(*kept, bias=p.bias[rest], return_stats=True)[1]
        for name in ("nll", "lse", "confidence", "entropy", "correct"):
            assert_close(getattr(stats, name), getattr(found, name), 1e-12, name)
        for run in (
            lambda b=budget: linear_cross_entropy(*p.args, bias=p.bias, max_buffer_bytes=b),
            lambda b=budget: balanced_linear_cross_entropy(
                *p.args, bias=p.bias, window=4, max_buffer_bytes=b
            ),
            lambda b=budget: linear_nll(
                *p.args, bias=p.bias, gradient="sampled", eps=1e-2, max_buffer_bytes=b
            ).sum(),
        ):
            value = run()
            assert bool(torch.isfinite(value))
            for name, grad in p.gradients(value).items():
                assert bool(torch.isfinite(grad).all()), name
                if name != "hidden":
                    assert bool((grad[banned] == 0).all()), name


def test_a_masked_target_costs_infinity():
    # As in torch, and in every path alike; a weight of 0 takes the token out again.
    p = draw_problem(6, 3, 8, bias=True, ignored=0)
    with torch.no_grad():
        p.bias[2] = -math.inf
    p.target[:] = torch.tensor([0, 1, 2, 3, 4, 5])
    weight = torch.ones(6, dtype=torch.float64)
    weight[2] = 0
    expected = reference.linear_nll(*p.args, bias=p.bias).detach()
    assert expected[2] == math.inf
    for frozen in ((), ("weight", "bias"), ("hidden", "weight", "bias")):
        q = p.copy(frozen=frozen)
        assert linear_nll(*q.args, bias=q.bias)[2] == math.inf
        total = linear_cross_entropy(*q.args, bias=q.bias, reduction="sum")
        assert total == math.inf
        rest = linear_cross_entropy(*q.args, bias=q.bias, reduction="sum", token_weight=weight)
        assert math.isclose(rest.detach(), float(expected[weight > 0].sum()), rel_tol=1e-12)

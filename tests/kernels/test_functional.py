"""The public functions in float64 against the specification: values, statistics, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_kernels import (
    BalancedTokenStats,
    TokenStats,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    reference,
    token_weights,
)
from bft_kernels.checks import SCHEMES

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


def settings(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "bias"}


def expected_nll(p, options: dict) -> Tensor:
    return reference.linear_nll(*p.args, bias=p.bias, **settings(options))


def gradients(loss: Tensor, p, retain: bool = False) -> dict[str, Tensor]:
    """Of the leaves; zeros where the loss does not reach them, as in a batch without labels."""
    leaves = p.leaves
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain)
    return dict(zip(leaves, found, strict=True))


# --- values and statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_statistics(shape, options, budget, problem, close):
    n, d, v, ignored = shape
    p = problem(n, d, v, ignored=ignored, bias="bias" in options)
    nll, stats = linear_nll(
        *p.args, bias=p.bias, max_buffer_bytes=budget, return_stats=True, **settings(options)
    )
    assert isinstance(stats, TokenStats)
    assert nll.dtype == torch.float64
    close(nll, expected_nll(p, options), 1e-12)
    labelled = p.target != -100
    expected = reference.token_stats(
        p.hidden[labelled], p.weight, p.target[labelled], bias=p.bias, **settings(options)
    )
    for name, value in expected.items():
        got = getattr(stats, name)
        close(got[labelled], value, 1e-12, name)
        assert not got.requires_grad
        assert bool((got[~labelled] == 0).all()), name
    assert stats.variance is None
    assert stats.hidden_variance is None


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [*OPTIONS, *LOSS_OPTIONS], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_values(reduction, options, budget, problem, close):
    for n, d, v, ignored in SHAPES:
        p = problem(n, d, v, ignored=ignored, bias="bias" in options)
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
            close(got, expected, 1e-12)


def test_equals_torch(problem, close):
    # The drop-in claim itself, without the specification in between.
    p = problem(40, 12, 90, bias=True)
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    for reduction in ("none", "mean", "sum"):
        expected = torch.nn.functional.cross_entropy(
            logits, p.target, reduction=reduction, label_smoothing=0.1
        )
        got = linear_cross_entropy(
            *p.args, bias=p.bias, reduction=reduction, label_smoothing=0.1, ignore_index=-100
        )
        close(got, expected, 1e-12)


def test_confidence_times_loss_is_dft(problem, close):
    p = problem(40, 12, 90)
    stats = linear_nll(*p.args, return_stats=True)[1]
    loss = linear_cross_entropy(*p.args, token_weight=stats.confidence)
    dft = balanced_linear_cross_entropy(*p.args, scheme="dft", normalize="token")
    close(loss, dft, 1e-12)
    close(gradients(loss, p), gradients(dft, p), 1e-12)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_for_any_upstream_gradient(shape, options, budget, problem, close):
    n, d, v, ignored = shape
    p = problem(n, d, v, ignored=ignored, bias="bias" in options)
    upstream = torch.randn(n, dtype=torch.float64)
    expected = gradients((upstream * expected_nll(p, options)).sum(), p)
    nll = linear_nll(*p.args, bias=p.bias, max_buffer_bytes=budget, **settings(options))
    close(gradients((upstream * nll).sum(), p), expected, 1e-11)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [*OPTIONS, *LOSS_OPTIONS], ids=str)
def test_cross_entropy_gradients(options, budget, reduction, problem, close):
    for n, d, v, ignored in SHAPES:
        p = problem(n, d, v, ignored=ignored, bias="bias" in options)
        factor, upstream = torch.rand(n, dtype=torch.float64), torch.randn((), dtype=torch.float64)
        token = expected_nll(p, options) * factor
        count = max(1, int((p.target != -100).sum()))
        scale = upstream / count if reduction == "mean" else upstream
        got = linear_cross_entropy(
            *p.args,
            bias=p.bias,
            reduction=reduction,
            token_weight=factor,
            max_buffer_bytes=budget,
            **settings(options),
        )
        close(gradients((got * upstream).sum(), p), gradients(token.sum() * scale, p), 1e-11)


FROZEN = [
    (),
    ("weight",),
    ("hidden",),
    ("bias",),
    ("weight", "bias"),
    ("hidden", "bias"),
    ("hidden", "weight"),
]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("shape", [(13, 6, 33, 0.5), (0, 4, 9, 0.0), (5, 4, 9, 1.0)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_frozen_inputs(frozen, shape, softcap, problem, close):
    n, d, v, ignored = shape
    p = problem(n, d, v, ignored=ignored, bias=True, frozen=frozen)
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
            close(loss, expected[name], 1e-11)
            close(gradients(loss, p), gradients(expected[name], p, True), 1e-11, f"{name} {budget}")
            for leaf in (p.hidden, p.weight, p.bias):
                assert leaf.grad is None
    # backward() leaves the frozen ones alone.
    losses["nll"]().backward()
    for name in frozen:
        assert getattr(p, name).grad is None


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_inputs_sampled(frozen, seed, problem, close):
    p = problem(33, 16, 129, bias=True)
    upstream = torch.randn(33, dtype=torch.float64)

    def run(q) -> dict[str, Tensor]:
        nll = linear_nll(*q.args, bias=q.bias, gradient="sampled", eps=2**-5, seed=seed)
        return gradients((upstream * nll).sum(), q)

    whole, part = run(p), run(p.copy(frozen=frozen))
    close(part, {name: grad for name, grad in whole.items() if name not in frozen}, 1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=str)
def test_gradcheck(options, frozen, problem):
    p = problem(6, 4, 9, bias="bias" in options, frozen=frozen)
    upstream = torch.randn(6, dtype=torch.float64)

    def weighted(*leaves: Tensor) -> tuple[Tensor, Tensor]:
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


def test_masked_columns(problem, close):
    # A bias of -inf takes columns out of the vocabulary, as constrained decoding does.
    p = problem(30, 8, 40, bias=True)
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
        close(loss, expected, 1e-12)
        close(gradients(loss, p), gradients(expected, p, True), 1e-11)
        found = linear_nll(*kept, bias=p.bias[rest], return_stats=True)[1]
        for name in ("nll", "lse", "confidence", "entropy", "correct"):
            close(getattr(stats, name), getattr(found, name), 1e-12, name)
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
            for name, grad in gradients(value, p).items():
                assert bool(torch.isfinite(grad).all()), name
                if name != "hidden":
                    assert bool((grad[banned] == 0).all()), name


def test_a_masked_target_costs_infinity(problem):
    # As in torch, and in every path alike; a weight of 0 takes the token out again.
    p = problem(6, 3, 8, bias=True, ignored=0)
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


# --- the balanced loss ---------------------------------------------------------------------------

DOCUMENTS = [(33,), (0, 12, 0, 1, 20), (5, 5, 5, 5, 5, 5, 3), (30, 3)]


def cumulative(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def independent_balanced_loss(p, cu: Tensor, scheme: str, window: int, normalize: str) -> Tensor:
    """The loss from full logits in one short loop, with ``token_weights`` document by document."""
    log_p = torch.log_softmax(p.hidden @ p.weight.T, dim=1)
    total, documents, tokens = p.hidden.new_zeros(()), 0, 0
    for first, stop in zip(cu.tolist(), cu[1:].tolist(), strict=False):
        rows = [i for i in range(first, stop) if p.target[i] != -100]
        if not rows:
            continue
        nll = -torch.stack([log_p[i, p.target[i]] for i in rows])
        c = torch.exp(-nll.detach())
        count = len(rows)
        spans = [
            (max(0, t - window // 2), min(count, t + window - window // 2)) for t in range(count)
        ]
        if scheme.startswith("bft-v1"):
            size = min(window, count)
            spans = [(t, t + size) for t in range(count - size + 1)]
        if scheme == "bft-v1-code":
            low = min(float(c[a:b].log().mean().exp()) for a, b in spans)
        else:
            means = torch.stack([c[a:b].mean() for a, b in spans])
            low = float(means.min())
        s = 1.0 if scheme in ("sft", "dft") else 1.0 - low
        w = torch.ones_like(c) if scheme == "sft" else c
        if scheme == "bft":
            w = (c / (means + 1e-8)).clamp(0, 1)
        total = total + s * (w * nll).sum() / (count if normalize == "sequence" else 1)
        documents, tokens = documents + 1, tokens + count
    return total / max(1, documents if normalize == "sequence" else tokens)


@pytest.mark.parametrize("budget", [1, 4000, None])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_loss(scheme, lengths, normalize, budget, problem, close):
    # 33 rows of 41 logits: in 4000 bytes ten rows fit, so some documents do and some do not.
    p = problem(33, 7, 41, scale=2.0)
    cu = cumulative(lengths)
    expected = independent_balanced_loss(p, cu, scheme, 4, normalize)
    spec = reference.balanced_linear_cross_entropy(
        *p.args, cu, scheme=scheme, window=4, normalize=normalize
    )
    close(spec, expected, 1e-12)
    for dtype in (torch.int32, torch.int64):
        got = balanced_linear_cross_entropy(
            *p.args,
            cu_seqlens=cumulative(lengths, dtype),
            scheme=scheme,
            window=4,
            normalize=normalize,
            max_buffer_bytes=budget,
        )
        close(got, expected, 1e-11)
        close(gradients(got, p), gradients(expected, p, True), 1e-11)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("frozen", FROZEN[:5], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_gradients_are_those_of_constants_times_nll(
    scheme, frozen, gradient, seed, problem, close
):
    p = problem(33, 7, 91, bias=True, scale=2.0, frozen=frozen)
    cu, how = cumulative((10, 0, 23)), {"gradient": gradient, "seed": seed, "eps": 2**-6}
    loss, stats = balanced_linear_cross_entropy(
        *p.args, bias=p.bias, cu_seqlens=cu, scheme=scheme, window=5, return_stats=True, **how
    )
    assert isinstance(stats, BalancedTokenStats)
    owner = torch.repeat_interleave(torch.arange(3), cu.diff())
    labels = torch.zeros(3).index_add(0, owner, (p.target != -100).float())
    coefficient = stats.token_weight * stats.sequence_weight[owner] / labels[owner].clamp(min=1)
    coefficient = coefficient / int((labels > 0).sum())
    assert not coefficient.requires_grad
    same = (coefficient * linear_nll(*p.args, bias=p.bias, **how)).sum()
    close(loss, same, 1e-12)
    close(gradients(loss, p, True), gradients(same, p), 1e-12)
    if gradient == "exact":
        spec = (coefficient * reference.linear_nll(*p.args, bias=p.bias)).sum()
        close(gradients(loss, p), gradients(spec, p), 1e-11)


@pytest.mark.parametrize("budget", [1, 3000, None])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_statistics(scheme, gradient, budget, problem, close):
    p = problem(33, 7, 91, scale=2.0)
    cu = cumulative((0, 12, 1, 20))
    p.target[12] = -100  # the document of one token has no label
    _, stats = balanced_linear_cross_entropy(
        *p.args,
        cu_seqlens=cu,
        scheme=scheme,
        window=5,
        gradient=gradient,
        max_buffer_bytes=budget,
        return_stats=True,
    )
    labelled = p.target != -100
    own = reference.token_stats(p.hidden[labelled], p.weight, p.target[labelled])
    for name, value in own.items():
        close(getattr(stats, name)[labelled], value, 1e-12, name)
    through = torch.nn.functional.pad(labelled.long().cumsum(0), (1, 0))
    expected = token_weights(own["confidence"].detach(), through[cu], scheme=scheme, window=5)
    close(stats.token_weight[labelled], expected.token_weight, 1e-11)
    close(stats.window_confidence[labelled], expected.window_confidence, 1e-11)
    close(stats.sequence_weight, expected.sequence_weight, 1e-11)
    close(stats.sequence_confidence, expected.sequence_confidence, 1e-11)
    assert stats.sequence_weight[[0, 2]].tolist() == [0, 0]
    for name in ("token_weight", "window_confidence", "confidence", "lse", "entropy"):
        assert bool((getattr(stats, name)[~labelled] == 0).all()), name
    assert (stats.variance is not None) == (gradient == "sampled")


def test_callable_scheme(problem, close):
    p = problem(33, 7, 91)
    cu, seen = cumulative((10, 0, 23)), []

    def scheme(confidence: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(cu_seqlens.tolist())
        assert confidence.shape == (cu_seqlens[-1],)
        return confidence.sqrt(), 1 + cu_seqlens.diff().double()

    loss, stats = balanced_linear_cross_entropy(
        *p.args, cu_seqlens=cu, scheme=scheme, return_stats=True
    )
    spec = reference.balanced_linear_cross_entropy(*p.args, cu, scheme=scheme)
    close(loss, spec, 1e-12)
    close(gradients(loss, p), gradients(spec, p), 1e-12)
    close(stats.token_weight, stats.confidence.sqrt())
    labels = (p.target != -100).long()
    assert seen[0] == [0, int(labels[:10].sum()), int(labels[:10].sum()), int(labels.sum())]
    assert stats.sequence_weight[1] == 0


def test_one_document_many_layouts(problem, close):
    # The same three documents: rows of a padded batch, packed, and one by one.
    p = problem(24, 6, 50, scale=2.0)
    lengths = (8, 5, 3)
    for row, length in enumerate(lengths):
        p.target[row * 8 + length : row * 8 + 8] = -100
    padded = balanced_linear_cross_entropy(
        p.hidden.view(3, 8, 6), p.weight, p.target.view(3, 8), window=3
    )
    rows = torch.cat([torch.arange(row * 8, row * 8 + n) for row, n in enumerate(lengths)])
    packed = balanced_linear_cross_entropy(
        p.hidden[rows], p.weight, p.target[rows], cu_seqlens=cumulative(lengths), window=3
    )
    single = sum(
        balanced_linear_cross_entropy(
            p.hidden[row * 8 : row * 8 + n],
            p.weight,
            p.target[row * 8 : row * 8 + n],
            window=3,
            num_items=3,
        )
        for row, n in enumerate(lengths)
    )
    for other in (packed, single):
        close(other, padded, 1e-12)
        close(gradients(other, p), gradients(padded, p, True), 1e-12)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accumulation_equals_the_one_big_batch(steps, normalize, gradient, problem, close):
    # Loss and gradients of micro-batches with the step's num_items, and backward() after each.
    p = problem(64, 6, 50, scale=2.0)
    hidden, target = p.hidden.detach().view(8, 8, 6), p.target.view(8, 8)
    target[3] = -100
    how = {"window": 3, "normalize": normalize, "gradient": gradient, "eps": 1e-9}
    items = 7 if normalize == "sequence" else int((target != -100).sum())
    whole = p.copy()
    expected = balanced_linear_cross_entropy(
        whole.hidden.view(8, 8, 6), whole.weight, target, **how
    )
    expected.backward()
    size, total, parts = 8 // steps, 0.0, []
    for part in range(0, 8, size):
        h = hidden[part : part + size].clone().requires_grad_()
        # An int, or the tensor that a trainer has after gathering the counts.
        count = items if part else torch.tensor(items)
        loss = balanced_linear_cross_entropy(
            h, p.weight, target[part : part + size], num_items=count, **how
        )
        loss.backward()
        total = total + loss.detach()
        parts.append(h.grad)
    # eps of 1e-9 leaves the sampled gradient nearly nothing to draw.
    tolerance = 1e-12 if gradient == "exact" else 1e-8
    close(total, expected, 1e-12)
    close(torch.cat(parts).view(64, 6), whole.hidden.grad, tolerance)
    close(p.weight.grad, whole.weight.grad, tolerance)


# --- nothing to do -------------------------------------------------------------------------------


def every_loss(p, **options) -> dict[str, Tensor]:
    return {
        "nll": linear_nll(*p.args, bias=p.bias, **options).sum(),
        "mean": linear_cross_entropy(*p.args, bias=p.bias, **options),
        "sum": linear_cross_entropy(*p.args, bias=p.bias, reduction="sum", **options),
        "none": linear_cross_entropy(*p.args, bias=p.bias, reduction="none", **options).sum(),
        **{
            scheme: balanced_linear_cross_entropy(*p.args, bias=p.bias, scheme=scheme, **options)
            for scheme in SCHEMES
        },
        "callable": balanced_linear_cross_entropy(
            *p.args, bias=p.bias, scheme=lambda c, cu: (c, c.new_ones(len(cu) - 1)), **options
        ),
    }


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_without_labels_the_loss_is_zero_and_attached(rows, frozen, gradient, problem):
    p = problem(rows, 4, 9, ignored=1.0, bias=True, frozen=frozen)
    for name, loss in every_loss(p, gradient=gradient).items():
        assert float(loss.detach()) == 0, name
        assert loss.requires_grad, name
        for leaf, grad in gradients(loss, p).items():
            assert bool((grad == 0).all()), f"{name}: d{leaf}"


def test_without_labels_statistics_are_zero(problem):
    p = problem(6, 4, 9, ignored=1.0)
    loss, stats = balanced_linear_cross_entropy(
        *p.args, cu_seqlens=torch.tensor([0, 0, 4, 6]), gradient="sampled", return_stats=True
    )
    assert float(loss.detach()) == 0
    for name, value in stats._asdict().items():
        assert value is None or bool((value == 0).all()), name


def test_nan_in_ignored_rows_does_not_leak(problem, close):
    p = problem(20, 4, 9, bias=True, ignored=0.4)
    p.target[0], p.target[1] = -100, 3
    clean = p.copy()
    with torch.no_grad():
        p.hidden[p.target == -100] = math.nan
        p.hidden[0] = math.inf
    losses = {
        "nll": lambda q, **how: linear_nll(*q.args, bias=q.bias, **how).square().sum(),
        "mean": lambda q, **how: linear_cross_entropy(*q.args, bias=q.bias, **how),
        "bft": lambda q, **how: balanced_linear_cross_entropy(
            *q.args, bias=q.bias, window=3, **how
        ),
    }
    for gradient in ("exact", "sampled"):
        for name, run in losses.items():
            for frozen in ((), ("weight", "bias"), ("hidden",)):
                got, expected = p.copy(frozen=frozen), clean.copy(frozen=frozen)
                a, b = (run(q, gradient=gradient, seed=1) for q in (got, expected))
                close(a, b, 1e-13, name)
                close(gradients(a, got), gradients(b, expected), 1e-13, name)


# --- forms of the input --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 2, 2), (2, 0)], ids=str)
def test_any_number_of_dimensions(shape, problem, close):
    count = math.prod(shape)
    p = problem(count, 5, 11, ignored=0.2)
    hidden, target = p.hidden.view(*shape, 5), p.target.view(shape)
    flat = linear_nll(*p.args)
    nll, stats = linear_nll(hidden, p.weight, target, return_stats=True)
    assert nll.shape == target.shape
    for value in (stats.nll, stats.lse, stats.confidence, stats.entropy, stats.correct):
        assert value.shape == target.shape
    close(nll.reshape(-1), flat, 1e-14)
    assert linear_cross_entropy(hidden, p.weight, target, reduction="none").shape == shape
    upstream = torch.randn(shape, dtype=torch.float64)
    close(
        gradients((upstream * nll).sum(), p), gradients((upstream.view(-1) * flat).sum(), p), 1e-13
    )
    if len(shape) <= 2:
        balanced = balanced_linear_cross_entropy(hidden, p.weight, target)
        rows = shape[0] if len(shape) == 2 else 1
        cu = torch.arange(rows + 1) * (count // max(rows, 1))
    else:
        cu = torch.tensor([0, 5, count])
        balanced = balanced_linear_cross_entropy(hidden, p.weight, target, cu_seqlens=cu)
    assert balanced.shape == ()
    close(balanced, reference.balanced_linear_cross_entropy(*p.args, cu), 1e-12)


def test_documents_may_cross_rows(problem, close):
    p = problem(12, 5, 11)
    cu = torch.tensor([0, 7, 12])
    flat = balanced_linear_cross_entropy(*p.args, cu_seqlens=cu, window=3)
    rows = balanced_linear_cross_entropy(
        p.hidden.view(3, 4, 5), p.weight, p.target.view(3, 4), cu_seqlens=cu, window=3
    )
    close(rows, flat, 1e-14)


def non_contiguous(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts, as leaves."""
    spaced = torch.stack([x.detach(), torch.full_like(x, 7)], dim=-1)[..., 0]
    transposed = x.detach().t().contiguous().t() if x.dim() == 2 else spaced
    backwards = x.detach().flip(0).flip(0)
    offset = torch.cat([x.detach().new_full((1, *x.shape[1:]), 7), x.detach()])[1:]
    return {"spaced": spaced, "transposed": transposed, "flipped": backwards, "offset": offset}


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("layout", ["spaced", "transposed", "flipped", "offset"])
def test_non_contiguous_inputs(layout, gradient, problem, problem_from, close):
    p = problem(21, 6, 40, bias=True)
    bias, target = (non_contiguous(x)[layout] for x in (p.bias, p.target))
    q = problem_from(
        non_contiguous(p.hidden)[layout], non_contiguous(p.weight)[layout], target, bias
    )
    upstream = torch.randn(42, dtype=torch.float64)[::2]
    how = {"gradient": gradient, "seed": 5, "max_buffer_bytes": 4000}
    cu = torch.tensor([0, 3, 9, 9, 14, 5, 21, 8])[[0, 2, 4, 6]]
    for budget in (500, None):
        how["max_buffer_bytes"] = budget
        results = []
        for x in (p, q):
            nll = linear_nll(*x.args, bias=x.bias, **how)
            loss = balanced_linear_cross_entropy(
                *x.args, bias=x.bias, cu_seqlens=cu, window=3, **how
            )
            results.append((nll, gradients((upstream * nll).sum(), x), gradients(loss, x)))
        for got, expected in zip(results[1], results[0], strict=True):
            close(got, expected, 1e-12)


def test_expanded_inputs(close):
    # A hidden state shared by all tokens, and an upstream gradient without memory of its own.
    hidden = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(17, (9,))
    nll = linear_nll(hidden.expand(9, 6), weight, target)
    expected = reference.linear_nll(hidden.expand(9, 6), weight, target)
    close(nll, expected, 1e-13)
    got = torch.autograd.grad(nll, [hidden, weight], torch.ones(()).double().expand(9))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**6])
def test_ignore_index(ignore_index, problem, close):
    p = problem(30, 5, 11, ignore_index=ignore_index)
    labelled = p.target != ignore_index
    expected = reference.linear_nll(*p.args, ignore_index=ignore_index)
    nll = linear_nll(*p.args, ignore_index=ignore_index)
    close(nll, expected, 1e-13)
    assert bool((nll[~labelled] == 0).all())
    mean = linear_cross_entropy(*p.args, ignore_index=ignore_index)
    close(mean, expected.sum() / labelled.sum(), 1e-13)
    close(gradients(mean, p), gradients(expected.sum() / labelled.sum(), p), 1e-12)
    balanced = balanced_linear_cross_entropy(*p.args, ignore_index=ignore_index, window=4)
    spec = reference.balanced_linear_cross_entropy(
        *p.args, torch.tensor([0, 30]), ignore_index=ignore_index, window=4
    )
    close(balanced, spec, 1e-12)


# --- with and without gradients ------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("budget", [1, 3000, None])
def test_the_loss_is_the_same_with_and_without_gradients(gradient, budget, problem, close):
    p = problem(33, 7, 91, bias=True)
    how = {"gradient": gradient, "max_buffer_bytes": budget}
    with torch.no_grad():
        bare = every_loss(p, **how)
    for frozen in FROZEN:
        close(every_loss(p.copy(frozen=frozen), **how), bare, 1e-12, str(frozen))
    assert not any(loss.requires_grad for loss in bare.values())
    with torch.inference_mode():
        close(every_loss(p, **how), bare, 1e-12)


def test_statistics_do_not_change_the_loss(problem):
    p = problem(33, 7, 91)
    for gradient in ("exact", "sampled"):
        for function in (linear_nll, linear_cross_entropy, balanced_linear_cross_entropy):
            plain = function(*p.args, gradient=gradient)
            assert torch.equal(function(*p.args, gradient=gradient, return_stats=True)[0], plain)


# --- random numbers ------------------------------------------------------------------------------


def sampled_gradient(p, seed: int | Tensor | None) -> Tensor:
    loss = linear_nll(*p.args, gradient="sampled", eps=2**-3, seed=seed).sum()
    return torch.autograd.grad(loss, p.weight)[0]


def test_a_seed_decides_the_sample(problem):
    p = problem(33, 7, 91)
    first = sampled_gradient(p, 5)
    assert torch.equal(sampled_gradient(p, 5), first)
    assert torch.equal(sampled_gradient(p, torch.tensor(5)), first)
    assert not torch.equal(sampled_gradient(p, 6), first)
    for extreme in (-(2**63), 2**63 - 1, -1):
        assert not torch.equal(sampled_gradient(p, extreme), first)


def test_without_a_seed_torchs_generator_decides(problem):
    p = problem(33, 7, 91)
    torch.manual_seed(3)
    first, second = sampled_gradient(p, None), sampled_gradient(p, None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sampled_gradient(p, None), first)
    assert torch.equal(sampled_gradient(p, None), second)


def test_only_a_sample_consumes_random_numbers(problem):
    p = problem(33, 7, 91)
    state = torch.get_rng_state()
    every_loss(p)
    with torch.no_grad():
        every_loss(p, gradient="sampled")
    sampled_gradient(p, 5)
    assert torch.equal(torch.get_rng_state(), state)
    sampled_gradient(p, None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_exact_gradients_are_deterministic(problem):
    p = problem(200, 16, 300, dtype=torch.float32)
    for run in (
        lambda: linear_nll(*p.args).sum(),
        lambda: balanced_linear_cross_entropy(*p.args, max_buffer_bytes=50_000),
    ):
        first, second = gradients(run(), p), gradients(run(), p)
        for name in first:
            assert torch.equal(first[name], second[name]), name


# --- as on an accelerator -------------------------------------------------------------------------


ACCELERATED: dict[str, Callable[..., Any]] = {
    "exact": lambda *args, **how: linear_nll(*args, **how).square().sum(),
    "sampled": lambda *args, **how: linear_nll(
        *args, gradient="sampled", eps=0.05, seed=3, **how
    ).sum(),
    "mean": linear_cross_entropy,
    "balanced": lambda *args, **how: balanced_linear_cross_entropy(
        *args, cu_seqlens=torch.tensor([0, 7, 7, 20, 33]), window=4, **how
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, 600])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ACCELERATED)
def test_ignored_rows_that_stay_change_nothing(
    name, softcap, budget, frozen, problem, close, monkeypatch
):
    """On an accelerator nobody waits for the number of labelled rows: ignored ones are masked."""
    p = problem(33, 5, 12, bias=True, frozen=("weight", "bias") if frozen else ())
    p.hidden.data[p.target == -100] = math.nan  # what padding holds must not matter
    results = []
    for known in (True, False):
        monkeypatch.setattr(
            "bft_kernels.backends.torch.rows.count_is_known", lambda device, known=known: known
        )
        own = p.copy(frozen=p.frozen)
        loss = ACCELERATED[name](
            *own.args, bias=own.bias, softcap=softcap, max_buffer_bytes=budget, backend="torch"
        )
        loss.backward()
        results.append((loss, own.grads()))
    close(results[1][0], results[0][0], 1e-12)
    close(results[1][1], results[0][1], 1e-12)


@pytest.mark.parametrize("function", [linear_cross_entropy, balanced_linear_cross_entropy])
def test_a_batch_of_upstream_gradients(function, problem, close):
    p = problem(9, 4, 7)
    loss = function(*p.args)
    (one,) = torch.autograd.grad(loss, p.weight, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=loss.dtype)
    (many,) = torch.autograd.grad(loss, p.weight, factors, is_grads_batched=True)
    close(many, factors[:, None, None] * one, 1e-12)

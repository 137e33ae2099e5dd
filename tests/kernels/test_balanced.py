"""The balanced loss in float64 against the specification: values, gradients, statistics."""

import pytest
import torch

from bft_kernels import (
    BalancedTokenStats,
    balanced_linear_cross_entropy,
    linear_nll,
    reference,
    token_weights,
)
from bft_kernels.settings import SCHEMES
from tests.support.problems import FROZEN, assert_close, boundaries, draw_problem

pytestmark = pytest.mark.usefixtures("poison")

DOCUMENTS = [(33,), (0, 12, 0, 1, 20), (5, 5, 5, 5, 5, 5, 3), (30, 3)]


def independent_balanced_loss(p, cu, scheme, window, normalize):
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
def test_balanced_loss(scheme, lengths, normalize, budget):
    # 33 rows of 41 logits: in 4000 bytes ten rows fit, so some documents do and some do not.
    p = draw_problem(33, 7, 41, scale=2.0)
    cu = boundaries(lengths)
    expected = independent_balanced_loss(p, cu, scheme, 4, normalize)
    spec = reference.balanced_linear_cross_entropy(
        *p.args, cu, scheme=scheme, window=4, normalize=normalize
    )
    assert_close(spec, expected, 1e-12)
    for dtype in (torch.int32, torch.int64):
        got = balanced_linear_cross_entropy(
            *p.args,
            cu_seqlens=boundaries(lengths, dtype),
            scheme=scheme,
            window=4,
            normalize=normalize,
            max_buffer_bytes=budget,
        )
        assert_close(got, expected, 1e-11)
        assert_close(p.gradients(got), p.gradients(expected, True), 1e-11)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("frozen", FROZEN[:5], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_gradients_are_those_of_constants_times_nll(scheme, frozen, gradient, seed):
    p = draw_problem(33, 7, 91, bias=True, scale=2.0, frozen=frozen)
    cu, how = boundaries((10, 0, 23)), {"gradient": gradient, "seed": seed, "eps": 2**-6}
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
    assert_close(loss, same, 1e-12)
    assert_close(p.gradients(loss, True), p.gradients(same), 1e-12)
    if gradient == "exact":
        spec = (coefficient * reference.linear_nll(*p.args, bias=p.bias)).sum()
        assert_close(p.gradients(loss), p.gradients(spec), 1e-11)


@pytest.mark.parametrize("budget", [1, 3000, None])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_statistics(scheme, gradient, budget):
    p = draw_problem(33, 7, 91, scale=2.0)
    cu = boundaries((0, 12, 1, 20))
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
        assert_close(getattr(stats, name)[labelled], value, 1e-12, name)
    through = torch.nn.functional.pad(labelled.long().cumsum(0), (1, 0))
    expected = token_weights(own["confidence"].detach(), through[cu], scheme=scheme, window=5)
    assert_close(stats.token_weight[labelled], expected.token_weight, 1e-11)
    assert_close(stats.window_confidence[labelled], expected.window_confidence, 1e-11)
    assert_close(stats.sequence_weight, expected.sequence_weight, 1e-11)
    assert_close(stats.sequence_confidence, expected.sequence_confidence, 1e-11)
    assert stats.sequence_weight[[0, 2]].tolist() == [0, 0]
    for name in ("token_weight", "window_confidence", "confidence", "lse", "entropy"):
        assert bool((getattr(stats, name)[~labelled] == 0).all()), name
    assert (stats.variance is not None) == (gradient == "sampled")


def test_callable_scheme():
    p = draw_problem(33, 7, 91)
    cu, seen = boundaries((10, 0, 23)), []

    def scheme(confidence, cu_seqlens):
        seen.append(cu_seqlens.tolist())
        assert confidence.shape == (cu_seqlens[-1],)
        return confidence.sqrt(), 1 + cu_seqlens.diff().double()

    loss, stats = balanced_linear_cross_entropy(
        *p.args, cu_seqlens=cu, scheme=scheme, return_stats=True
    )
    spec = reference.balanced_linear_cross_entropy(*p.args, cu, scheme=scheme)
    assert_close(loss, spec, 1e-12)
    assert_close(p.gradients(loss), p.gradients(spec), 1e-12)
    assert_close(stats.token_weight, stats.confidence.sqrt())
    labels = (p.target != -100).long()
    assert seen[0] == [0, int(labels[:10].sum()), int(labels[:10].sum()), int(labels.sum())]
    assert stats.sequence_weight[1] == 0


def test_one_document_many_layouts():
    # The same three documents: rows of a padded batch, packed, and one by one.
    p = draw_problem(24, 6, 50, scale=2.0)
    lengths = (8, 5, 3)
    for row, length in enumerate(lengths):
        p.target[row * 8 + length : row * 8 + 8] = -100
        p.target[row * 8] = row  # of documents without a label none would be counted
    padded = balanced_linear_cross_entropy(
        p.hidden.view(3, 8, 6), p.weight, p.target.view(3, 8), window=3
    )
    rows = torch.cat([torch.arange(row * 8, row * 8 + n) for row, n in enumerate(lengths)])
    packed = balanced_linear_cross_entropy(
        p.hidden[rows], p.weight, p.target[rows], cu_seqlens=boundaries(lengths), window=3
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
        assert_close(other, padded, 1e-12)
        assert_close(p.gradients(other), p.gradients(padded, True), 1e-12)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accumulation_equals_the_one_big_batch(steps, normalize, gradient):
    # Loss and gradients of micro-batches with the step's num_items, and backward() after each.
    p = draw_problem(64, 6, 50, scale=2.0)
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
    assert_close(total, expected, 1e-12)
    assert_close(torch.cat(parts).view(64, 6), whole.hidden.grad, tolerance)
    assert_close(p.weight.grad, whole.weight.grad, tolerance)


def by_root(confidence, cu_seqlens):
    return confidence.sqrt(), torch.ones_like(cu_seqlens[1:], dtype=confidence.dtype)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=len)
@pytest.mark.parametrize(
    "how",
    [{}, {"scheme": "dft"}, {"scheme": by_root}, {"gradient": "sampled", "seed": 1}],
    ids=["bft", "dft", "callable", "sampled"],
)
def test_a_step_of_no_items_costs_nothing(how, frozen, normalize, backend):
    p = draw_problem(12, 6, 50, bias=True, dtype=torch.float32, ignored=1.0, frozen=frozen)
    rows, target = p.hidden.view(3, 4, 6), p.target.view(3, 4)
    how = {"bias": p.bias, "normalize": normalize, "backend": backend, **how}
    for items in (0, 0.0, torch.tensor(0), torch.tensor([0.0])):
        loss, stats = balanced_linear_cross_entropy(
            rows, p.weight, target, num_items=items, return_stats=True, **how
        )
        assert loss.item() == 0
        assert loss.requires_grad
        for name, grad in p.gradients(loss).items():
            assert not grad.any(), name
        for name, value in stats._asdict().items():
            assert value is None or bool(value.isfinite().all()), name
    target[1, 2] = 3
    with pytest.raises(ValueError, match=r"^num_items: got 0 with 1 labelled tokens .*whole step"):
        balanced_linear_cross_entropy(rows, p.weight, target, num_items=0, **how)

"""The balanced loss in float64 against the specification: values, gradients, statistics."""

import pytest
import torch

from bft_kernels import BalancedTokenStats, balanced_linear_cross_entropy, reference, token_weights
from bft_kernels.settings import SCHEMES
from tests.support.losses import assert_same_loss, balanced, nll, specified_balanced, specified_nll
from tests.support.problems import FROZEN, assert_close, boundaries, draw_problem

pytestmark = pytest.mark.usefixtures("poison")

DOCUMENTS = [(33,), (0, 12, 0, 1, 20), (5, 5, 5, 5, 5, 5, 3), (30, 3)]


@pytest.mark.parametrize("budget", [1, 4000, None])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_loss(scheme, lengths, normalize, budget):
    # 33 rows of 41 logits: in 4000 bytes ten rows fit, so some documents do and some do not.
    p = draw_problem(33, 7, 41, scale=2.0)
    how = {"scheme": scheme, "window": 4, "normalize": normalize}
    expected = specified_balanced(p, boundaries(lengths), **how)
    for dtype in (torch.int32, torch.int64):
        loss = balanced(p, cu_seqlens=boundaries(lengths, dtype), max_buffer_bytes=budget, **how)
        assert_same_loss(p, loss, expected)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("frozen", FROZEN[:5], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_gradients_are_those_of_constants_times_nll(scheme, frozen, gradient, seed):
    p = draw_problem(33, 7, 91, bias=True, scale=2.0, frozen=frozen)
    cu, how = boundaries((10, 0, 23)), {"gradient": gradient, "seed": seed, "eps": 2**-6}
    loss, stats = balanced(p, cu_seqlens=cu, scheme=scheme, window=5, return_stats=True, **how)
    assert isinstance(stats, BalancedTokenStats)
    owner = torch.repeat_interleave(torch.arange(3), cu.diff())
    labels = torch.zeros(3).index_add(0, owner, p.labelled.float())
    coefficient = stats.token_weight * stats.sequence_weight[owner] / labels[owner].clamp(min=1)
    coefficient = coefficient / int((labels > 0).sum())
    gradients = p.gradients(loss, True)
    assert_same_loss(p, loss, (coefficient * nll(p, **how)).sum(), 1e-12)
    if gradient == "exact":
        spec = (coefficient * specified_nll(p)).sum()
        assert_close(gradients, p.gradients(spec), 1e-11)


@pytest.mark.parametrize("budget", [1, 3000, None])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balanced_statistics(scheme, gradient, budget):
    p = draw_problem(33, 7, 91, scale=2.0)
    cu = boundaries((0, 12, 1, 20))
    p.target[12] = -100  # the document of one token has no label
    how = {"scheme": scheme, "window": 5, "gradient": gradient, "max_buffer_bytes": budget}
    how |= {"hidden_variance": gradient == "sampled", "return_stats": True}
    _, stats = balanced(p, cu_seqlens=cu, **how)
    assert not any(value is not None and value.requires_grad for value in stats)
    labelled, own = p.labelled, reference.token_stats(*p.of_labelled().args)
    for name, value in own.items():
        assert_close(getattr(stats, name)[labelled], value, 1e-12, name)
    through = torch.nn.functional.pad(labelled.long().cumsum(0), (1, 0))
    expected = token_weights(own["confidence"], through[cu], scheme=scheme, window=5)
    for name, value in expected._asdict().items():
        got = getattr(stats, name)
        assert_close(got[labelled] if len(got) == 33 else got, value, 1e-11, name)
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

    loss, stats = balanced(p, cu_seqlens=cu, scheme=scheme, return_stats=True)
    assert_same_loss(p, loss, specified_balanced(p, cu, scheme=scheme), 1e-12)
    assert_close(stats.token_weight, stats.confidence.sqrt())
    windows = balanced(p, cu_seqlens=cu, return_stats=True)[1].window_confidence
    assert_close(stats.window_confidence, windows)
    first, both = int(p.labelled[:10].sum()), int(p.labelled.sum())
    assert seen[0] == [0, first, first, both]
    assert stats.sequence_weight[1] == 0


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accumulation_equals_the_one_big_batch(steps, normalize, gradient):
    # Loss and gradients of micro-batches with the step's num_items, and backward() after each.
    p = draw_problem(64, 6, 50, scale=2.0)
    p.target[24:32] = -100
    how = {"window": 3, "normalize": normalize, "gradient": gradient, "eps": 1e-9}
    items = 7 if normalize == "sequence" else int(p.labelled.sum())
    whole, total = p.copy(), 0.0

    def run(q, rows, **more):
        hidden, target = q.hidden[rows].view(-1, 8, 6), q.target[rows].view(-1, 8)
        loss = balanced_linear_cross_entropy(hidden, q.weight, target, **how, **more)
        loss.backward()
        return loss.detach()

    expected = run(whole, slice(None))
    for rows in torch.arange(64).chunk(steps):
        # An int, or the tensor that a trainer has after gathering the counts.
        total = total + run(p, rows, num_items=items if rows[0] else torch.tensor(items))
    # eps of 1e-9 leaves the sampled gradient nearly nothing to draw.
    assert_close(total, expected, 1e-12)
    assert_close(p.grads(), whole.grads(), 1e-12 if gradient == "exact" else 1e-8)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=len)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scheme": "dft"},
        {"scheme": lambda c, cu: (c, c.new_ones(3))},
        {"gradient": "sampled", "seed": 1},
    ],
    ids=["bft", "dft", "callable", "sampled"],
)
def test_a_step_of_no_items_costs_nothing(how, frozen, normalize, backend):
    p = draw_problem(12, 6, 50, bias=True, dtype=torch.float32, ignored=1.0, frozen=frozen)
    how = {"cu_seqlens": boundaries((4, 4, 4)), "normalize": normalize, "backend": backend, **how}
    for items in (0, 0.0, torch.tensor(0), torch.tensor([0.0])):
        loss, stats = balanced(p, num_items=items, return_stats=True, **how)
        assert loss.item() == 0
        assert loss.requires_grad
        for name, grad in p.gradients(loss).items():
            assert not grad.any(), name
        for name, value in stats._asdict().items():
            assert value is None or not value.any(), name
    p.target[6] = 3
    with pytest.raises(ValueError, match=r"^num_items: got 0 with 1 labelled tokens .*whole step"):
        balanced(p, num_items=0, **how)

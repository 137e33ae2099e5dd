"""Ids and log-probabilities of the most probable tokens."""

import math

import pytest
import torch

from bft_kernels import linear_nll, reference
from tests.kernels.test_functional import OPTIONS, SHAPES, drawn
from tests.support.losses import nll
from tests.support.problems import assert_close, draw_problem


@pytest.mark.parametrize("budget", [700, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_they_are_the_specification_s(options, budget, poison):
    for shape in SHAPES:
        p, how = drawn(shape, options, scale=3.0)
        for k in {1, min(3, shape[2]), shape[2]}:
            loss, stats = nll(p, top_k=k, max_buffer_bytes=budget, **how)
            assert torch.equal(loss, nll(p, max_buffer_bytes=budget, **how))
            own = p.of_labelled()
            ids, log_probs = reference.top_k(own.hidden, own.weight, k, bias=own.bias, **how)
            assert torch.equal(stats.top_ids[p.labelled], ids)
            assert_close(stats.top_log_probs[p.labelled], log_probs, 1e-12)
            assert not stats.top_log_probs.requires_grad
            assert bool((stats.top_ids[~p.labelled] == -1).all())
            assert not bool(stats.top_log_probs[~p.labelled].any())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(dtype, backend):
    """Logits are few whole numbers, zeros of both signs and infinities among them."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("it computes in float32")
    p = draw_problem(20, 3, 60, bias=True, dtype=dtype, ignored=0.0)
    with torch.no_grad():
        p.hidden.round_()
        p.weight.round_()
        p.bias.round_()[::7] = -math.inf
        p.target.fill_(1)
    _, stats = nll(p, top_k=60, backend=backend)
    z = reference.logits(p.hidden.double(), p.weight.double(), p.bias.double())
    want = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(stats.top_ids, want.indices)
    assert_close(stats.top_log_probs, want.values - z.logsumexp(1, keepdim=True), 1e-6)
    assert torch.equal(stats.correct, stats.top_ids[:, 0] == 1)


def test_they_have_the_target_s_shape_and_gradients_do_not_notice():
    p, how = draw_problem(24, 6, 31), {"gradient": "sampled", "eps": 2**-5, "seed": 3}
    hidden, target = p.hidden.view(3, 8, 6), p.target.view(3, 8)
    loss, stats = linear_nll(hidden, p.weight, target, shift=True, top_k=4, **how)
    assert stats.top_ids.shape == stats.top_log_probs.shape == (3, 8, 4)
    assert stats.top_ids.dtype == torch.int64
    alone = linear_nll(hidden, p.weight, target, shift=True, **how)
    assert_close(p.gradients(loss.sum()), p.gradients(alone.sum()), 0)

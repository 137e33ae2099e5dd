"""Statistics with a gradient: lse and entropy, whichever backend ran the forward."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bft_kernels import linear_nll, reference
from tests.kernels.test_functional import OPTIONS, SHAPES, drawn
from tests.support.losses import nll
from tests.support.problems import assert_close, draw_problem, error_of
from tests.support.soak import soaked

BOTH = ("lse", "entropy")


def factors(p):
    """Of the loss, of lse and of the entropy of each token."""
    return dict(zip(("nll", *BOTH), torch.randn(3, p.target.numel()).double(), strict=True))


def ours(p, factor, differentiable=BOTH, **how):
    """A sum of what has a gradient."""
    loss, stats = nll(p, differentiable=differentiable, **how)
    found = {"nll": loss, "lse": stats.lse, "entropy": stats.entropy}
    return sum((factor[name] * found[name]).sum() for name in ("nll", *differentiable))


def specified(p, factor, names=BOTH, **how):
    stats = reference.token_stats(
        p.hidden[p.labelled], p.weight, p.target[p.labelled], bias=p.bias, **how
    )
    return sum((factor[name][p.labelled] * stats[name]).sum() for name in ("nll", *names))


@pytest.mark.parametrize(
    ("options", "names", "budget"),
    soaked(
        OPTIONS,
        [("lse",), ("entropy",), BOTH],
        [1, 700, None],
        plain=lambda options, names, budget: budget == 700 and (names == BOTH or not options),
    ),
    ids=str,
)
def test_gradients_are_the_specification_s(options, names, budget, poison):
    frozen = itertools.cycle([(), ("weight", "bias"), ("hidden",)])
    for shape, constant in zip(SHAPES, frozen, strict=False):
        p, how = drawn(shape, options, frozen=constant, scale=3.0)
        q, factor = p.copy(), factors(p)
        loss = ours(p, factor, names, max_buffer_bytes=budget, **how)
        want = specified(q, factor, names, **how)
        assert_close(loss, want, 1e-12)
        assert_close(p.gradients(loss), q.gradients(want), 1e-11, f"{shape} {constant}")


def test_only_what_is_named_has_a_gradient():
    p = draw_problem(9, 4, 13)
    for names in ([], ["entropy"], ["lse"], BOTH):
        _, stats = linear_nll(*p.args, return_stats=True, differentiable=names)
        for name, value in stats._asdict().items():
            assert value is None or value.requires_grad == (name in names), name
    with torch.no_grad():
        assert not linear_nll(*p.args, differentiable=BOTH)[1].lse.requires_grad


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_plain_torch(dtype, backend):
    p = draw_problem(200, 24, 300, bias=True, dtype=dtype, scale=2.0)
    exact, plain, factor = p.copy(torch.float64), p.copy(), factors(p)
    want = exact.gradients(specified(exact, factor))
    eager = plain.gradients(specified(plain, factor))
    got = p.gradients(ours(p, factor, backend=backend))
    for name in want:  # in float16 plain torch makes NaN
        bound = max(2 * torch.finfo(dtype).eps, 1.5 * error_of(eager[name], want[name]))
        assert error_of(got[name], want[name]) < bound, name


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masked_columns_have_no_part(softcap):
    p = draw_problem(12, 4, 20, bias=True)
    with torch.no_grad():
        p.target[p.labelled] %= 15
        p.bias[15:] = -math.inf
    less = replace(p.copy(), weight=p.weight[:15], bias=p.bias[:15])
    factor, how = factors(p), {"softcap": softcap} if softcap else {}
    if softcap:  # then a mask is a logit of -softcap
        assert_close(
            p.gradients(ours(p, factor, **how))["hidden"],
            (q := p.copy()).gradients(specified(q, factor, **how))["hidden"],
        )
        return
    got, want = p.gradients(ours(p, factor)), less.gradients(specified(less, factor))
    assert_close(got["hidden"], want["hidden"])
    assert_close(got["weight"][:15], want["weight"])
    assert not bool(got["weight"][15:].any())
    p.target[0] = 17  # a token that cannot be: its own loss is infinite, its gradients are not
    _, stats = linear_nll(*p.args, bias=p.bias, differentiable=BOTH)
    gradients = p.gradients((stats.lse + stats.entropy).sum())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sampled_lse_has_the_sampled_gradient_of_nll_and_that_of_the_label(options, backend):
    """So it is unbiased as the former is, and it adds to gradients that are there."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    for shape in SHAPES:
        p, how = drawn(shape, options, dtype=dtype)
        own, found = p.labelled, []
        factor = torch.randn(shape[0], dtype=dtype)
        z = reference.logits(p.hidden[own], p.weight, p.bias, **how)
        of_label = (factor[own] * z.gather(1, p.target[own, None]).squeeze(1)).sum()
        how |= {"gradient": "sampled", "eps": 0.3, "seed": 5, "backend": backend}
        _, stats = nll(p, differentiable=("lse",), **how)
        loss = (factor * nll(p, **how)).sum()
        for scalar in ((factor * stats.lse).sum(), of_label + loss):
            for leaf in p.leaves.values():
                leaf.grad = torch.ones_like(leaf)
            scalar.backward()
            found.append({name: leaf.grad for name, leaf in p.leaves.items()})
        assert_close(*found, 1e-12 if backend == "torch" else 1e-5, f"{shape}")


def test_a_sampled_lse_is_unbiased():
    p = draw_problem(6, 4, 12, ignored=0.2)
    _, exact = linear_nll(*p.args, differentiable=("lse",))
    want, seeds = p.gradients(exact.lse.square().sum()), 300
    how = {"gradient": "sampled", "eps": 0.5, "differentiable": ("lse",)}
    drawn = [
        p.gradients(linear_nll(*p.args, seed=seed, **how)[1].lse.square().sum())
        for seed in range(seeds)
    ]
    for name in want:
        values = torch.stack([gradient[name] for gradient in drawn])
        deviation = (values.mean(0) - want[name]).abs()
        assert bool((deviation <= 6 * values.std(0) / math.sqrt(seeds) + 1e-9).all()), name

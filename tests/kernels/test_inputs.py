"""The public functions for every form of their inputs: empty, strided, seeded, on a device."""

import math

import pytest
import torch

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll
from bft_kernels.settings import SCHEMES
from tests.support.losses import (
    assert_same_loss,
    balanced,
    cross_entropy,
    nll,
    specified_balanced,
    specified_nll,
)
from tests.support.problems import FROZEN, Problem, assert_close, draw_problem

pytestmark = pytest.mark.usefixtures("poison")


def every_loss(p, **options):
    def even(confidence, cu_seqlens):
        return confidence, confidence.new_ones(len(cu_seqlens) - 1)

    return {
        "nll": nll(p, **options).sum(),
        "mean": cross_entropy(p, **options),
        "sum": cross_entropy(p, reduction="sum", **options),
        "none": cross_entropy(p, reduction="none", **options).sum(),
        **{scheme: balanced(p, scheme=scheme, **options) for scheme in SCHEMES},
        "callable": balanced(p, scheme=even, **options),
    }


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_without_labels_the_loss_is_zero_and_attached(rows, frozen, gradient):
    p = draw_problem(rows, 4, 9, ignored=1.0, bias=True, frozen=frozen)
    for name, loss in every_loss(p, gradient=gradient).items():
        assert float(loss.detach()) == 0, name
        assert loss.requires_grad, name
        for leaf, grad in p.gradients(loss).items():
            assert bool((grad == 0).all()), f"{name}: d{leaf}"


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_nan_in_ignored_rows_does_not_leak(gradient, frozen):
    clean = draw_problem(20, 4, 9, bias=True, ignored=0.4, frozen=frozen)
    clean.target[:2] = torch.tensor([-100, 3])
    p = clean.copy()
    p.hidden.data[~p.labelled] = math.nan
    p.hidden.data[0] = math.inf
    how = {"gradient": gradient, "seed": 1, "check": True}  # which does not report it either
    for run in (
        lambda q: nll(q, **how).square().sum(),
        lambda q: cross_entropy(q, **how),
        lambda q: balanced(q, window=3, **how),
    ):
        a, b = run(p), run(clean)
        assert_close(a, b, 1e-13)
        assert_close(p.gradients(a), clean.gradients(b), 1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 2, 2), (2, 0)], ids=str)
def test_any_number_of_dimensions(shape):
    count = math.prod(shape)
    p = draw_problem(count, 5, 11, ignored=0.2)
    hidden, target = p.hidden.view(*shape, 5), p.target.view(shape)
    flat, (loss, stats) = nll(p), linear_nll(hidden, p.weight, target, return_stats=True)
    for value in (loss, stats.nll, stats.lse, stats.confidence, stats.entropy, stats.correct):
        assert value.shape == target.shape
    assert linear_cross_entropy(hidden, p.weight, target, reduction="none").shape == shape
    assert_close(loss.reshape(-1), flat, 1e-14)
    upstream = torch.randn(shape, dtype=torch.float64)
    assert_same_loss(p, (upstream * loss).sum(), (upstream.view(-1) * flat).sum(), 1e-13)
    if len(shape) <= 2:
        rows = shape[0] if len(shape) == 2 else 1
        cu, given = torch.arange(rows + 1) * (count // max(rows, 1)), None
    else:
        cu = given = torch.tensor([0, 5, count])
    loss = balanced_linear_cross_entropy(hidden, p.weight, target, cu_seqlens=given)
    assert loss.shape == ()
    assert_close(loss, specified_balanced(p, cu), 1e-12)


def non_contiguous(x):
    """The same values in other layouts, or those of the first row."""
    spaced = torch.stack([x.detach(), torch.full_like(x, 7)], dim=-1)[..., 0]
    transposed = x.detach().t().contiguous().t() if x.dim() == 2 else spaced
    backwards = x.detach().flip(0).flip(0)
    offset = torch.cat([x.detach().new_full((1, *x.shape[1:]), 7), x.detach()])[1:]
    shared = x.detach()[:1].expand_as(x)  # by all rows
    layouts = {"spaced": spaced, "transposed": transposed, "flipped": backwards, "offset": offset}
    return layouts | {"expanded": shared}


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("layout", ["spaced", "transposed", "flipped", "offset", "expanded"])
def test_non_contiguous_inputs(layout, gradient):
    p = draw_problem(21, 6, 40, bias=True)
    inputs = [non_contiguous(x)[layout] for x in (*p.args, p.bias)]
    q, p = Problem(*inputs), Problem(*(x.contiguous() for x in inputs))
    upstream = torch.randn(42, dtype=torch.float64)[::2]
    cu = torch.tensor([0, 3, 9, 9, 14, 5, 21, 8])[[0, 2, 4, 6]]
    for budget in (500, None):
        how = {"gradient": gradient, "seed": 5, "max_buffer_bytes": budget}
        results = []
        for x in (p, q):
            loss = nll(x, **how)
            summed = balanced(x, cu_seqlens=cu, window=3, **how)
            results.append((loss, x.gradients((upstream * loss).sum()), x.gradients(summed)))
        for got, expected in zip(results[1], results[0], strict=True):
            assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**6])
def test_ignore_index(ignore_index):
    p = draw_problem(30, 5, 11, ignore_index=ignore_index)
    labelled, how = p.target != ignore_index, {"ignore_index": ignore_index}
    expected, loss = specified_nll(p, **how), nll(p, **how)
    assert_close(loss, expected, 1e-13)
    assert bool((loss[~labelled] == 0).all())
    assert_same_loss(p, cross_entropy(p, **how), expected.sum() / labelled.sum(), 1e-12)
    spec = specified_balanced(p, torch.tensor([0, 30]), window=4, **how)
    assert_close(balanced(p, window=4, **how), spec, 1e-12)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("budget", [1, 3000, None])
def test_the_loss_is_the_same_with_and_without_gradients(gradient, budget):
    p = draw_problem(33, 7, 91, bias=True)
    how = {"gradient": gradient, "max_buffer_bytes": budget}
    with torch.no_grad():
        bare = every_loss(p, **how)
    for frozen in FROZEN:
        assert_close(every_loss(p.copy(frozen=frozen), **how), bare, 1e-12, str(frozen))
    assert not any(loss.requires_grad for loss in bare.values())
    with torch.inference_mode():
        assert_close(every_loss(p, **how), bare, 1e-12)


def test_statistics_do_not_change_the_loss():
    p = draw_problem(33, 7, 91)
    for gradient in ("exact", "sampled"):
        for function in (linear_nll, linear_cross_entropy, balanced_linear_cross_entropy):
            plain = function(*p.args, gradient=gradient)
            assert torch.equal(function(*p.args, gradient=gradient, return_stats=True)[0], plain)


def sampled_gradient(p, seed):
    return p.gradients(nll(p, gradient="sampled", eps=2**-3, seed=seed).sum())["weight"]


def test_a_seed_decides_the_sample():
    p = draw_problem(33, 7, 91)
    first = sampled_gradient(p, 5)
    assert torch.equal(sampled_gradient(p, 5), first)
    assert torch.equal(sampled_gradient(p, torch.tensor(5)), first)
    assert not torch.equal(sampled_gradient(p, 6), first)
    for extreme in (-(2**63), 2**63 - 1, -1):
        assert not torch.equal(sampled_gradient(p, extreme), first)


def test_without_a_seed_torchs_generator_decides():
    p = draw_problem(33, 7, 91)
    torch.manual_seed(3)
    first, second = sampled_gradient(p, None), sampled_gradient(p, None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sampled_gradient(p, None), first)
    assert torch.equal(sampled_gradient(p, None), second)


def test_only_a_sample_consumes_random_numbers():
    p = draw_problem(33, 7, 91)
    state = torch.get_rng_state()
    every_loss(p)
    with torch.no_grad():
        every_loss(p, gradient="sampled")
    sampled_gradient(p, 5)
    assert torch.equal(torch.get_rng_state(), state)
    sampled_gradient(p, None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_exact_gradients_are_deterministic():
    p = draw_problem(200, 16, 300, dtype=torch.float32)
    for run in (lambda: nll(p).sum(), lambda: balanced(p, max_buffer_bytes=50_000)):
        torch.testing.assert_close(p.gradients(run()), p.gradients(run()), rtol=0, atol=0)


ACCELERATED = {
    "exact": lambda p, **how: nll(p, **how).square().sum(),
    "sampled": lambda p, **how: nll(p, gradient="sampled", eps=0.05, seed=3, **how).sum(),
    "mean": cross_entropy,
    "balanced": lambda p, **how: balanced(
        p, cu_seqlens=torch.tensor([0, 0, 7, 7, 20, 33, 33]), window=4, **how
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, 600])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ACCELERATED)
def test_ignored_rows_that_stay_change_nothing(name, softcap, budget, frozen, monkeypatch):
    """On an accelerator nobody waits for the number of labelled rows: ignored ones are masked."""
    p = draw_problem(33, 5, 12, bias=True, frozen=("weight", "bias") if frozen else ())
    p.hidden.data[~p.labelled] = math.nan  # what padding holds must not matter
    how = {"softcap": softcap, "max_buffer_bytes": budget, "backend": "torch"}
    known = ACCELERATED[name](p, **how)
    gradients = p.gradients(known)
    monkeypatch.setattr("bft_kernels.backends.common.rows.count_is_known", lambda device: False)
    loss = ACCELERATED[name](p, **how)
    assert_close(loss, known, 1e-12)
    assert_close(p.gradients(loss), gradients, 1e-12)

"""The public functions for every form of their inputs: empty, strided, seeded, on a device."""

import math

import pytest
import torch

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll, reference
from bft_kernels.settings import SCHEMES
from tests.support.problems import FROZEN, Problem, assert_close, draw_problem

pytestmark = pytest.mark.usefixtures("poison")

# --- nothing to do -------------------------------------------------------------------------------


def every_loss(p, **options):
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
def test_without_labels_the_loss_is_zero_and_attached(rows, frozen, gradient):
    p = draw_problem(rows, 4, 9, ignored=1.0, bias=True, frozen=frozen)
    for name, loss in every_loss(p, gradient=gradient).items():
        assert float(loss.detach()) == 0, name
        assert loss.requires_grad, name
        for leaf, grad in p.gradients(loss).items():
            assert bool((grad == 0).all()), f"{name}: d{leaf}"


def test_without_labels_statistics_are_zero():
    p = draw_problem(6, 4, 9, ignored=1.0)
    loss, stats = balanced_linear_cross_entropy(
        *p.args, cu_seqlens=torch.tensor([0, 0, 4, 6]), gradient="sampled", return_stats=True
    )
    assert float(loss.detach()) == 0
    for name, value in stats._asdict().items():
        assert value is None or bool((value == 0).all()), name


def test_nan_in_ignored_rows_does_not_leak():
    p = draw_problem(20, 4, 9, bias=True, ignored=0.4)
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
                assert_close(a, b, 1e-13, name)
                assert_close(got.gradients(a), expected.gradients(b), 1e-13, name)


# --- forms of the input --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 2, 2), (2, 0)], ids=str)
def test_any_number_of_dimensions(shape):
    count = math.prod(shape)
    p = draw_problem(count, 5, 11, ignored=0.2)
    hidden, target = p.hidden.view(*shape, 5), p.target.view(shape)
    flat = linear_nll(*p.args)
    nll, stats = linear_nll(hidden, p.weight, target, return_stats=True)
    assert nll.shape == target.shape
    for value in (stats.nll, stats.lse, stats.confidence, stats.entropy, stats.correct):
        assert value.shape == target.shape
    assert_close(nll.reshape(-1), flat, 1e-14)
    assert linear_cross_entropy(hidden, p.weight, target, reduction="none").shape == shape
    upstream = torch.randn(shape, dtype=torch.float64)
    assert_close(
        p.gradients((upstream * nll).sum()), p.gradients((upstream.view(-1) * flat).sum()), 1e-13
    )
    if len(shape) <= 2:
        balanced = balanced_linear_cross_entropy(hidden, p.weight, target)
        rows = shape[0] if len(shape) == 2 else 1
        cu = torch.arange(rows + 1) * (count // max(rows, 1))
    else:
        cu = torch.tensor([0, 5, count])
        balanced = balanced_linear_cross_entropy(hidden, p.weight, target, cu_seqlens=cu)
    assert balanced.shape == ()
    assert_close(balanced, reference.balanced_linear_cross_entropy(*p.args, cu), 1e-12)


def test_documents_may_cross_rows():
    p = draw_problem(12, 5, 11)
    cu = torch.tensor([0, 7, 12])
    flat = balanced_linear_cross_entropy(*p.args, cu_seqlens=cu, window=3)
    rows = balanced_linear_cross_entropy(
        p.hidden.view(3, 4, 5), p.weight, p.target.view(3, 4), cu_seqlens=cu, window=3
    )
    assert_close(rows, flat, 1e-14)


def non_contiguous(x):
    """The same values in other layouts, as leaves."""
    spaced = torch.stack([x.detach(), torch.full_like(x, 7)], dim=-1)[..., 0]
    transposed = x.detach().t().contiguous().t() if x.dim() == 2 else spaced
    backwards = x.detach().flip(0).flip(0)
    offset = torch.cat([x.detach().new_full((1, *x.shape[1:]), 7), x.detach()])[1:]
    return {"spaced": spaced, "transposed": transposed, "flipped": backwards, "offset": offset}


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("layout", ["spaced", "transposed", "flipped", "offset"])
def test_non_contiguous_inputs(layout, gradient):
    p = draw_problem(21, 6, 40, bias=True)
    bias, target = (non_contiguous(x)[layout] for x in (p.bias, p.target))
    q = Problem(non_contiguous(p.hidden)[layout], non_contiguous(p.weight)[layout], target, bias)
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
            results.append((nll, x.gradients((upstream * nll).sum()), x.gradients(loss)))
        for got, expected in zip(results[1], results[0], strict=True):
            assert_close(got, expected, 1e-12)


def test_expanded_inputs():
    # A hidden state shared by all tokens, and an upstream gradient without memory of its own.
    hidden = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(17, (9,))
    nll = linear_nll(hidden.expand(9, 6), weight, target)
    expected = reference.linear_nll(hidden.expand(9, 6), weight, target)
    assert_close(nll, expected, 1e-13)
    got = torch.autograd.grad(nll, [hidden, weight], torch.ones(()).double().expand(9))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**6])
def test_ignore_index(ignore_index):
    p = draw_problem(30, 5, 11, ignore_index=ignore_index)
    labelled = p.target != ignore_index
    expected = reference.linear_nll(*p.args, ignore_index=ignore_index)
    nll = linear_nll(*p.args, ignore_index=ignore_index)
    assert_close(nll, expected, 1e-13)
    assert bool((nll[~labelled] == 0).all())
    mean = linear_cross_entropy(*p.args, ignore_index=ignore_index)
    assert_close(mean, expected.sum() / labelled.sum(), 1e-13)
    assert_close(p.gradients(mean), p.gradients(expected.sum() / labelled.sum()), 1e-12)
    balanced = balanced_linear_cross_entropy(*p.args, ignore_index=ignore_index, window=4)
    spec = reference.balanced_linear_cross_entropy(
        *p.args, torch.tensor([0, 30]), ignore_index=ignore_index, window=4
    )
    assert_close(balanced, spec, 1e-12)


# --- with and without gradients ------------------------------------------------------------------


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


# --- random numbers ------------------------------------------------------------------------------


def sampled_gradient(p, seed):
    loss = linear_nll(*p.args, gradient="sampled", eps=2**-3, seed=seed).sum()
    return torch.autograd.grad(loss, p.weight)[0]


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
    for run in (
        lambda: linear_nll(*p.args).sum(),
        lambda: balanced_linear_cross_entropy(*p.args, max_buffer_bytes=50_000),
    ):
        first, second = p.gradients(run()), p.gradients(run())
        for name in first:
            assert torch.equal(first[name], second[name]), name


# --- as on an accelerator -------------------------------------------------------------------------


ACCELERATED = {
    "exact": lambda *args, **how: linear_nll(*args, **how).square().sum(),
    "sampled": lambda *args, **how: linear_nll(
        *args, gradient="sampled", eps=0.05, seed=3, **how
    ).sum(),
    "mean": linear_cross_entropy,
    "balanced": lambda *args, **how: balanced_linear_cross_entropy(
        *args, cu_seqlens=torch.tensor([0, 0, 7, 7, 20, 33, 33]), window=4, **how
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, 600])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ACCELERATED)
def test_ignored_rows_that_stay_change_nothing(name, softcap, budget, frozen, monkeypatch):
    """On an accelerator nobody waits for the number of labelled rows: ignored ones are masked."""
    p = draw_problem(33, 5, 12, bias=True, frozen=("weight", "bias") if frozen else ())
    p.hidden.data[p.target == -100] = math.nan  # what padding holds must not matter
    results = []
    for known in (True, False):
        monkeypatch.setattr(
            "bft_kernels.backends.common.rows.count_is_known", lambda device, known=known: known
        )
        own = p.copy(frozen=p.frozen)
        loss = ACCELERATED[name](
            *own.args, bias=own.bias, softcap=softcap, max_buffer_bytes=budget, backend="torch"
        )
        loss.backward()
        results.append((loss, own.grads()))
    assert_close(results[1][0], results[0][0], 1e-12)
    assert_close(results[1][1], results[0][1], 1e-12)

"""What every fused backend must do, against the float64 specification.

`cpu` on each instruction set that runs here; `triton` on a GPU, or else in its interpreter; `cuda`
on a GPU, or else in the emulation.
"""

import importlib.util
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll, reference
from bft_kernels.backends.common import on_device
from tests.support.problems import (
    DTYPES,
    TRANSFORMS,
    assert_close,
    cancellation,
    draw_problem,
    error_of,
)
from tests.support.samples import specified_sample, undecided
from tests.support.soak import soaked


@dataclass(frozen=True)
class Fused:
    """A backend under test."""

    name: str
    instruction_set: str | None
    device: str
    # Rows, width, vocabulary: smaller than a tile, no multiple of one, and several tiles.
    shapes: tuple[tuple[int, int, int], ...]
    chunks: bool | None = None  # on a device: whether logits lie in a buffer, a chunk at a time

    def __str__(self):
        if self.chunks is None:
            return self.instruction_set or self.name
        return f"{self.name}-{'chunks' if self.chunks else 'tiles'}"

    @property
    def slow(self):
        """Interpreted or emulated."""
        return self.name != "cpu" and self.device != "cuda"

    @property
    def interpreted(self):
        """Each path of Triton's takes seconds then."""
        return self.name == "triton" and self.device != "cuda"

    @property
    def how(self):
        return {"backend": self.name}


def backends():
    if importlib.util.find_spec("bft_kernels._cpu") is not None:
        from bft_kernels import _cpu

        shapes = ((1, 1, 1), (5, 7, 3), (0, 4, 9), (37, 24, 501), (33, 65, 1600), (70, 16, 515))
        for name in _cpu.instruction_sets():
            yield Fused("cpu", name, "cpu", shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu:7"
    if importlib.util.find_spec("triton") is not None:
        shapes = ((1, 1, 1), (5, 7, 3), (0, 4, 9), (19, 24, 150), (35, 33, 70))
        for chunks in (False, True):
            yield Fused("triton", None, device, shapes, chunks)
    # Several tiles of rows, of the vocabulary, of it in a split and of the width; in chunks, spans
    # of one warp, of some, and of all in a second turn.
    tiles = ((1, 1, 1), (5, 8, 127), (0, 4, 9), (37, 136, 129), (19, 67, 600), (130, 16, 260))
    chunks = ((1, 1, 1), (5, 7, 31), (0, 4, 9), (19, 24, 257), (135, 33, 70), (5, 9, 2311))
    yield Fused("cuda", None, device, tiles, False)
    yield Fused("cuda", None, device, chunks, True)


BACKENDS = list(backends())


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    """Chooses the instruction set, or chunks or tiles, of the backend that the test is given."""
    fused = request.node.callspec.params["fused"]
    if fused.chunks is not None:
        monkeypatch.setattr(on_device, "takes_chunks", lambda *_: fused.chunks)
    if fused.name == "cuda":
        request.getfixturevalue("cuda_backend")
    if fused.name != "cpu":
        request.getfixturevalue("on_device")
    if fused.instruction_set is None:
        yield
        return
    from bft_kernels import _cpu

    before = _cpu.instruction_set()
    _cpu.use_instruction_set(fused.instruction_set)
    yield
    _cpu.use_instruction_set(before)


every_backend = pytest.mark.parametrize("fused", BACKENDS, ids=str)


def some(cases, number):
    """About ``number`` of the cases, spread over all of them."""
    step = max(1, len(cases) // number)
    while step > 1 and any(math.gcd(step, k) > 1 for k in (2, 3, 5)):
        step -= 1
    return cases[::step]


def spread(*axes):
    """All combinations, but for ``triton``, whose interpreter is slow, a few dozen.

    One instruction set runs them all in every suite; of the others, and of what is emulated, every
    suite runs some and the soak the rest.
    """
    found = []
    for fused in BACKENDS:
        own = list(itertools.product([fused], fused.shapes, *axes))
        if fused.name == "triton":
            own = some(own, 20)
        elif fused != BACKENDS[0] and fused.device != "cuda":
            first = set(some(own, 75))
            own = [pytest.param(*x, marks=() if x in first else pytest.mark.soak) for x in own]
        found += own
    return found


def a_transform_a_type(fused, shape, transform, dtype):
    """Each shape with each transform, types in turn; interpreted, with one transform."""
    turn, at = fused.shapes.index(shape), list(TRANSFORMS).index(transform)
    right = DTYPES.index(dtype) == (turn + at) % len(DTYPES)
    return right and (turn % len(TRANSFORMS) == at or not fused.interpreted)


def upstream_of(target):
    return torch.linspace(0.5, 2, target.numel(), device=target.device)


BOUNDS = (0.0, 0.1, 0.1, 0.55, 1.0)  # documents, as fractions of the rows; one is empty


def boundaries(rows):
    return torch.tensor([int(rows * b) for b in BOUNDS])


LOSSES = {
    "nll": lambda p, **how: (linear_nll(*p.args, **how) * upstream_of(p.target)).sum(),
    "smoothed": lambda p, **how: linear_cross_entropy(
        *p.args, label_smoothing=0.2, z_loss=0.01, reduction="sum", **how
    ),
    "balanced": lambda p, **how: balanced_linear_cross_entropy(
        *p.args, cu_seqlens=boundaries(p.target.numel()), window=4, **how
    ),
}


def value_of(loss, p, **how):
    if how.pop("bias", False):
        how["bias"] = p.bias
    return loss(p, **how)


def run(loss, p, **how):
    value = value_of(loss, p, **how)
    value.backward()
    return {"loss": value.detach(), **{k: v for k, v in p.grads().items() if v is not None}}


@pytest.mark.parametrize(
    ("fused", "shape", "name", "transform", "dtype", "budget", "frozen"),
    spread(LOSSES, TRANSFORMS, DTYPES, [None, 6_000], [False, True]),
    ids=str,
)
def test_no_less_accurate_than_plain_torch(
    fused, shape, name, transform, dtype, budget, frozen, poison
):
    how = TRANSFORMS[transform]
    frozen = ("weight", "bias") if frozen else ()
    drawn = draw_problem(*shape, bias="bias" in how, dtype=dtype, scale=2.0, frozen=frozen)
    # The truth: the torch backend in float64 on the same values, itself tested elsewhere.
    truth = run(LOSSES[name], drawn.copy(torch.float64, frozen=frozen), backend="torch", **how)
    # What torch's own products and softmax make of them in float32, in the same blocks.
    plain = run(LOSSES[name], drawn.copy(torch.float32, frozen=frozen), backend="torch", **how)
    own = drawn.copy(frozen=frozen, device=fused.device)
    got = run(LOSSES[name], own, max_buffer_bytes=budget, **fused.how, **how)
    assert got.keys() == truth.keys()
    for part, expected in truth.items():
        assert got[part].dtype == (torch.float32 if part == "loss" else dtype)
        tiny = float(expected.abs().max()) < 1e-6 if expected.numel() else True
        if tiny:  # gradients that cancel
            assert float((got[part].cpu().double() - expected).abs().sum()) < 1e-4
            continue
        # Gradients are rounded to dtype once, at the end; on a GPU their operands are, too.
        finfo = torch.finfo(dtype if part != "loss" else torch.float32)
        rounding = finfo.eps  # and float16 has few digits below 6e-5
        rounding += finfo.smallest_normal * finfo.eps / float(expected.square().mean().sqrt())
        # Hundreds of blocks are hundreds of partial sums; a few numbers' error is a matter of luck.
        steady = budget is None and expected.numel() >= 16
        allowed = (2 if steady else 4) * error_of(plain[part], expected) + 6 * rounding
        if not steady and part != "loss":  # and so is how the terms of a sum cancel
            factor = cancellation(
                drawn, lambda p: value_of(LOSSES[name], p, backend="torch", **how)
            )
            allowed += 4 * torch.finfo(torch.float32).eps * factor[part]
        if part == "loss":  # a loss near 0 is the logarithm of a sum next to 1
            allowed += shape[0] * finfo.eps / float(expected.abs())
        assert error_of(got[part].cpu(), expected) <= allowed, part


@pytest.mark.parametrize(
    ("fused", "shape", "transform", "dtype"),
    [
        case
        for fused in BACKENDS
        for case in soaked([fused], fused.shapes, TRANSFORMS, DTYPES, plain=a_transform_a_type)
    ],
    ids=str,
)
def test_statistics(fused, shape, transform, dtype, poison):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(*shape, bias="bias" in how, dtype=dtype, scale=2.0)
    biased = how.pop("bias", False)
    if biased:
        p.bias.data[::3] = -math.inf
        p.bias.data[p.target[p.target >= 0]] = 0.5
    eps = {"plain": 2**-12, "softcap": 0.02, "bias": 1.0}[transform]
    options = {"gradient": "sampled", "eps": eps, "seed": 3, "return_stats": True}
    options["hidden_variance"] = True

    def stats_of(copy, **more):
        bias = copy.bias if biased else None
        return linear_nll(*copy.args, bias=bias, **options, **how, **more)

    nll, stats = stats_of(p.copy(device=fused.device), **fused.how)
    want, expected = stats_of(p.copy(torch.float64), backend="torch")
    assert_close(nll.cpu(), want, 1e-5)
    for field in expected._fields[:-2]:  # the most probable tokens are not asked for
        assert_close(getattr(stats, field).cpu(), getattr(expected, field), 1e-5, field)


@every_backend
def test_ties_go_to_the_lowest_index(fused):
    largest = [3, 70, 71, 135, 299] if fused.interpreted else [3, 70, 71, 135, 2100, 2999]
    weight = torch.zeros(largest[-1] + 1, 4)
    weight[largest] = 1.0
    target = torch.tensor([*largest, 0])
    hidden = torch.ones(len(target), 4)
    with torch.no_grad():
        inputs = (x.to(fused.device) for x in (hidden, weight, target))
        _, stats = linear_nll(*inputs, return_stats=True, **fused.how)
    assert stats.correct.tolist() == [True] + [False] * len(largest)


# --- the sample ----------------------------------------------------------------------------------


def logit_gradient(p, fused, **how):
    """``dz [N, V]`` of the sum of losses, from ``dW``: one more column of ``hidden`` for each row,
    against zeros in ``weight``, leaves the logits as they are.
    """
    rows, (vocabulary, width) = p.target.numel(), p.weight.shape
    hidden = torch.cat([p.hidden.detach(), torch.eye(rows, dtype=p.hidden.dtype)], 1)
    weight = torch.cat([p.weight.detach(), torch.zeros(vocabulary, rows, dtype=p.weight.dtype)], 1)
    weight = weight.to(fused.device).requires_grad_()
    inputs = hidden.to(fused.device), weight, p.target.to(fused.device)
    bias = None if p.bias is None else p.bias.detach().to(fused.device)
    linear_nll(*inputs, bias=bias, gradient="sampled", **fused.how, **how).sum().backward()
    return weight.grad[:, width:].T.cpu()


def a_type_a_transform(fused, dtype, transform):
    """Each type once and each transform once."""
    same = DTYPES.index(dtype) == list(TRANSFORMS).index(transform)
    return same or not fused.interpreted


@pytest.mark.parametrize(
    ("fused", "dtype", "transform"),
    soaked(BACKENDS, DTYPES, TRANSFORMS, plain=a_type_a_transform),
    ids=str,
)
def test_the_kept_set_is_the_specifications(fused, dtype, transform, seed):
    slow = fused.slow
    rows, vocabulary = (11, 170 if fused.interpreted else 2311) if slow else (60, 3000)
    how = dict(TRANSFORMS[transform])
    bias = how.pop("bias", False)
    p = draw_problem(rows, 24, vocabulary, ignored=0.1, dtype=dtype, scale=3.0, bias=bias)
    labelled, eps = p.labelled, 2**-6 if slow else 2**-9
    expected = specified_sample(p, seed, eps, **how).dy
    borderline = undecided(p, seed, eps, **how)
    for budget in (None, 10_000):
        dz = logit_gradient(p, fused, seed=seed, eps=eps, max_buffer_bytes=budget, **how)
        assert bool((dz[~labelled] == 0).all())
        dz = dz[labelled].double()
        assert not bool((((dz != 0) != (expected != 0)) & ~borderline).any())
        both = (dz != 0) & (expected != 0)
        assert int(both.sum()) > rows * (3 if slow else 10)
        torch.testing.assert_close(
            dz[both], expected[both], rtol=1e-4 + 2 * torch.finfo(dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize(
    ("fused", "kind"),
    soaked(
        BACKENDS,
        ["flat", "ascending", "descending", "target last"],
        plain=lambda fused, kind: kind in ("ascending", "target last") or not fused.interpreted,
    ),
    ids=str,
)
def test_hostile_logits(fused, kind, seed):
    """The running bound lets everything through here until late; nothing may be lost or pile up."""
    slow = fused.slow
    rows, vocabulary, eps = (5, 1100, 2**-6) if slow else (12, 40_000, 2**-10)
    steps = torch.linspace(0, 30, vocabulary)
    logits = {
        "flat": torch.zeros(vocabulary),
        "ascending": steps,
        "descending": -steps,
        "target last": torch.cat([torch.zeros(vocabulary - 1), torch.tensor([25.0])]),
    }[kind]
    hidden, weight = torch.ones(rows, 1), logits[:, None].contiguous()
    target = torch.full((rows,), vocabulary - 1)
    own = [x.to(fused.device) for x in (hidden, weight, target)]
    own[1].requires_grad_()
    options = {"gradient": "sampled", "eps": eps, "seed": seed, "return_stats": True}
    nll, stats = linear_nll(*own, **options, **fused.how)
    nll.sum().backward()
    expected = reference.sampled_gradient(hidden.double(), weight.double(), target, seed, eps=eps)
    got = own[1].grad.cpu().double()
    # A draw at the threshold may fall either way; 1e-5 is what float32 can make of a probability.
    u = reference.uniforms(seed, range(rows), torch.arange(vocabulary)).double()
    clear = ((u * eps / logits.double().softmax(0) - 1).abs() > 1e-5).all(0)
    assert int(clear.sum()) > 0.99 * vocabulary
    torch.testing.assert_close(got[clear], expected.dy.sum(0)[clear, None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        stats.variance.cpu().double(), expected.variance, rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize(
    ("fused", "gradient", "dtype"),
    soaked(
        BACKENDS,
        ["exact", "sampled"],
        DTYPES[:2],
        plain=lambda fused, gradient, dtype: dtype == torch.float32 or not fused.interpreted,
    ),
    ids=str,
)
def test_adds_to_a_gradient_that_is_there(fused, gradient, dtype):
    rows, vocabulary = (9, 70) if fused.interpreted else (20, 150)
    p = draw_problem(rows, 24, vocabulary, dtype=dtype).copy(device=fused.device)
    how = {"gradient": gradient, "seed": 1, "eps": 2**-6, **fused.how}
    linear_nll(*p.args, **how).sum().backward()
    once, place = p.weight.grad.clone(), p.weight.grad.data_ptr()
    linear_nll(*p.args, **how).sum().backward()
    assert p.weight.grad.data_ptr() == place
    assert_close(p.weight.grad.cpu(), 2 * once.cpu(), max(1e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("fused", "layout", "gradient"),
    soaked(
        BACKENDS,
        ["transposed", "expanded", "sliced"],
        ["exact", "sampled"],
        plain=lambda fused, layout, gradient: (
            layout == "transposed" or gradient == "exact" or not fused.interpreted
        ),
    ),
    ids=str,
)
def test_rows_that_do_not_lie_together(fused, layout, gradient):
    p = draw_problem(24, 24, 120, dtype=torch.float32)
    hidden = {
        "transposed": p.hidden.detach().t().contiguous().t(),
        "expanded": p.hidden.detach()[:1].expand(24, 24),
        "sliced": torch.cat([p.hidden.detach()] * 2, 1)[:, :24],
    }[layout]
    results = []
    for backend in ("torch", fused.name):
        device = "cpu" if backend == "torch" else fused.device
        x = hidden.clone() if backend == "torch" else hidden.to(device)
        x = x.detach().requires_grad_()
        weight = p.weight.detach().clone().to(device).requires_grad_()
        # A gradient in a layout of its own, as a user may have made it.
        own = torch.ones(24, 120, device=device).t()
        weight.grad = own if layout == "transposed" else None
        how = {"gradient": gradient, "seed": 2, "eps": 2**-6, "backend": backend}
        linear_nll(x, weight, p.target.to(device), **how).sum().backward()
        results.append((x.grad.cpu(), weight.grad.cpu()))
    assert_close(results[1][0], results[0][0], 1e-5)
    assert_close(results[1][1], results[0][1], 1e-5)


SAMPLED = {"gradient": "sampled", "hidden_variance": True}


@pytest.mark.parametrize(
    ("fused", "how", "value"),
    soaked(
        BACKENDS,
        [{}, SAMPLED, SAMPLED | {"softcap": 5.0}],
        [math.nan, math.inf],
        plain=lambda fused, how, value: (
            not fused.interpreted or ("softcap" not in how and math.isnan(value))
        ),
    ),
    ids=str,
)
def test_nan_stays_in_its_row(fused, how, value):
    rows, vocabulary = (9, 70) if fused.interpreted else (20, 150)
    p = draw_problem(rows, 9, vocabulary, ignored=0.0, dtype=torch.float32)
    p.hidden.data[7, :2] = value
    p.weight.data[:, :2] = torch.tensor([1.0, -1.0])  # inf - inf, whatever the others are
    p = p.copy(device=fused.device)
    nll, stats = linear_nll(*p.args, seed=0, return_stats=True, **fused.how, **how)
    nll.sum().backward()
    bad = torch.arange(rows, device=fused.device) == 7
    spoiled = [nll, stats.lse, p.hidden.grad.sum(1)]
    if how:
        spoiled += [stats.variance, stats.hidden_variance]
    for got in spoiled:
        assert torch.equal(got.isnan(), bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("vocabulary", [151, 1105])
@every_backend
def test_a_bad_column_spoils_the_certificate_and_nothing_else(fused, value, vocabulary):
    p = draw_problem(20, 9, vocabulary, ignored=0.0, dtype=torch.float32)
    p.hidden.data[:, :2] = torch.tensor([1.0, -1.0])  # inf - inf, whatever the others are
    p.weight.data[5] = value
    p.target[::2] = 5
    p = p.copy(device=fused.device)
    options = {"gradient": "sampled", "seed": 0, "return_stats": True, "hidden_variance": True}
    with torch.no_grad():
        nll, stats = linear_nll(*p.args, **options, **fused.how)
    assert bool(stats.variance.isnan().all() and stats.hidden_variance.isnan().all())
    assert not bool(nll.isfinite().any())

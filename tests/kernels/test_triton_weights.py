"""The Triton backend's weights, in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_kernels import balanced_linear_cross_entropy, ops, reference, weighting
from bft_kernels.checks import SCHEMES
from bft_kernels.config import Weighting
from bft_kernels.dispatch import select_balanced_loss
from bft_kernels.results import BalancedLoss

pytest.importorskip("triton", reason="triton is not installed")

from bft_kernels.backends.triton.weights import TILE, balanced_loss, joint_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Lengths of documents and the part of their positions that carry labels.
LAYOUTS: dict[str, tuple[tuple[int, ...], float]] = {
    "nothing": ((), 1.0),
    "an empty document": ((0,), 1.0),
    "one token": ((1,), 1.0),
    "no label": ((5, 0, 3), 0.0),
    "short": ((0, 3, 0, 0, 17, 1, 2, 0), 0.6),
    "a tile to the last token": ((TILE, 2 * TILE - 1, 1), 1.0),
    "longer than tiles": ((3, 4 * TILE + 5, 7, 0), 0.7),
    "mostly prompt": ((90, 2, 40), 0.1),
}


def draw(lengths: tuple[int, ...], part: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, labels and boundaries; certain tokens next to hopeless ones."""
    count = sum(lengths)
    labelled = torch.rand(count) < part
    loss = torch.rand(count) * torch.randint(0, 60, (count,))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return torch.where(labelled, loss, 0), labelled, bounds


def run(
    loss: Tensor,
    labelled: Tensor,
    bounds: Tensor,
    settings: Weighting,
    normalize: str = "sequence",
    items: Tensor | None = None,
) -> BalancedLoss:
    inputs = (loss.to(DEVICE), labelled.to(DEVICE), bounds.to(DEVICE), items)
    return BalancedLoss(*(x.cpu() for x in balanced_loss(*inputs, normalize, settings)))


def plain(
    loss: Tensor,
    labelled: Tensor,
    bounds: Tensor,
    settings: Weighting,
    normalize: str = "sequence",
    items: Tensor | None = None,
) -> BalancedLoss:
    weights = (settings.scheme, settings.window, settings.gamma, settings.floor)
    return weighting.balanced_loss(loss, labelled, bounds, items, normalize, *weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_specification(scheme, layout, close):
    loss, labelled, bounds = draw(*LAYOUTS[layout])
    window = int(torch.tensor([1, 2, 5, 16, 10**12])[torch.randint(5, ())])
    normalize = "sequence" if torch.rand(()) < 0.5 else "token"
    items = torch.tensor(7) if torch.rand(()) < 0.5 else None
    settings = Weighting(scheme, window, 1.7)
    got = run(loss, labelled, bounds, settings, normalize, items)
    expected = plain(loss.double(), labelled, bounds, settings, normalize, items)
    for name, value in zip(got._fields, got, strict=True):
        assert value.dtype == torch.float32
        close(value, getattr(expected, name), 1e-6, name)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), labelled.cumsum(0)])
    coefficient = reference.token_coefficients(
        torch.exp(-loss.double()[labelled]),
        before[bounds],
        scheme=scheme,
        window=window,
        gamma=1.7,
        normalize=normalize,
        num_items=None if items is None else 7,
    )
    close(got.coefficient[labelled], coefficient, 1e-6)
    close(got.loss, (coefficient * loss.double()[labelled]).sum(), 1e-6)
    joint = joint_weights(*(x.to(DEVICE) for x in (loss, labelled, bounds)), settings).cpu()
    token = expected.token_weight
    owner = weighting.labelled_layout(labelled, bounds).sequence
    close(joint, token * expected.sequence_weight[owner] if len(owner) else token, 1e-6)


@pytest.mark.parametrize("scheme", ["bft", "bft-v1"])
def test_windows_keep_small_sums_next_to_large_ones(scheme):
    count, window = 20 * TILE + 7, 255
    passage = torch.randint(0, 80, (count // 100 + 1,)).repeat_interleave(100)[:count]
    loss = torch.where(passage > 40, passage + torch.rand(count), 0.0)
    every = torch.ones(count, dtype=torch.bool)
    got = run(loss, every, torch.tensor([0, count]), Weighting(scheme, window))
    scale = 2**200
    total = [0]
    for value in torch.exp(-loss.double()).tolist():
        total.append(total[-1] + int(Fraction(value) * scale))
    exact = []
    for t in range(count):
        if scheme == "bft":
            a, b = max(0, t - window // 2), min(count, t + window - window // 2)
        else:
            a = min(t, count - window)
            b = a + window
        exact.append((total[b] - total[a]) / (scale * (b - a)))
    error = got.window_confidence.double() / torch.tensor(exact, dtype=torch.float64) - 1
    assert error.abs().max() <= 5e-7
    assert abs(float(got.sequence_confidence) / min(exact) - 1) <= 5e-7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_at_the_ends_of_the_range(scheme):
    loss, labelled, bounds = draw((40, 2 * TILE, 30, 20, 1), 0.8)
    labelled[[5, 50, 100, 125]] = True
    loss[:40] = torch.where(labelled[:40], 1000.0, 0.0)
    loss[50], loss[70:80], loss[100] = math.inf, 0.0, 88.0
    loss[-31] = math.nan  # in the last but two document
    labelled[-31] = True
    settings = Weighting(scheme, 8)
    got, expected = run(loss, labelled, bounds, settings), plain(loss, labelled, bounds, settings)
    for name, value in zip(got._fields, got, strict=True):
        want = getattr(expected, name)
        if value.shape == labelled.shape:
            assert bool((value[~labelled] == 0).all()), name
            value, want = value[labelled], want[labelled]
        torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-44, equal_nan=True, msg=name)
    if scheme.startswith("bft"):
        assert got.sequence_weight.isnan().tolist() == [False, False, True, False, False]


def test_a_confidence_that_underflows_is_not_zero_to_its_logarithm():
    loss = torch.full((257,), 0.1)
    loss[100] = 110.0
    every = torch.ones(257, dtype=torch.bool)
    got = run(loss, every, torch.tensor([0, 257]), Weighting("bft-v1-code"))
    lowest = math.exp(-(110.0 + 255 * 0.1) / 256)
    assert float(got.sequence_weight) == pytest.approx(1 - lowest, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_documents_do_not_see_each_other(scheme):
    lengths = (0, 5, 3 * TILE, 0, TILE + 1, 1, 40)
    loss, labelled, bounds = draw(lengths, 0.8)
    settings = Weighting(scheme, 12)
    packed = run(loss, labelled, bounds.int(), settings, "token")
    parts = [
        run(a, b, torch.tensor([0, a.numel()]), settings, "token")
        for a, b in zip(loss.split(lengths), labelled.split(lengths), strict=True)
    ]
    # Not to rounding: exactly, since a window is summed in the same order wherever it is.
    for name in packed._fields[2:]:
        alone = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(packed, name), alone), name
    again = run(loss, labelled, bounds, settings, "token")
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_changes_nothing(scheme):
    loss, labelled, bounds = draw((7, 0, TILE + 9), 0.7)
    count = loss.numel()
    settings = Weighting(scheme, 6)
    expected = run(loss, labelled, bounds, settings)
    filled = torch.cat([bounds, bounds.new_full((count - 3,), count)])
    got = run(loss, labelled, filled, settings)
    for name, value in zip(got._fields, got, strict=True):
        want = getattr(expected, name)
        assert torch.equal(value[: want.numel()] if value.dim() else value, want), name
        assert value.dim() == 0 or bool((value[want.numel() :] == 0).all())
    # Positions behind the last boundary belong to no document.
    more = torch.full((TILE + 3,), 5.0)
    behind = run(torch.cat([loss, more]), torch.cat([labelled, more > 0]), bounds, settings)
    for name, value in zip(behind._fields, behind, strict=True):
        want = getattr(expected, name)
        assert torch.equal(value[: want.numel()] if value.dim() else value, want), name
        assert value.dim() == 0 or bool((value[want.numel() :] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_written_outside_a_buffer_or_left_unwritten(scheme, layout, guarded):
    got = run(*draw(*LAYOUTS[layout]), Weighting(scheme, 4))
    assert not any(bool(value.isnan().any()) for value in got)


@pytest.mark.parametrize("bounds", [[0, 50, 20, 70], [-9, 10**12, 70], [5, 5, -(2**40)]], ids=str)
def test_boundaries_that_nobody_checked_stay_inside(bounds, guarded):
    loss, labelled, _ = draw((70,), 0.8)
    for scheme in SCHEMES:
        run(loss, labelled, torch.tensor(bounds), Weighting(scheme, 4))


# --- the loss ------------------------------------------------------------------------------------


def boundaries(kind: str, rows: int) -> Tensor | None:
    ends = [0, rows // 5, rows // 5, rows - 7, rows]
    if kind == "padded":
        ends += [rows] * (rows - 4)
    return None if kind == "rows" else torch.tensor(ends)


@pytest.mark.parametrize("kind", ["rows", "boundaries", "padded", "on the device"])
@pytest.mark.parametrize("how", ["exact", "frozen", "sampled"])
@pytest.mark.parametrize("items", [None, 3.0])
def test_the_loss_and_its_gradients(how, kind, items, problem, close, poison):
    frozen = ("weight", "bias") if how == "frozen" else ()
    p = problem(36, 12, 70, bias=True, dtype=torch.float32, frozen=frozen)
    p.target[8:20] = -100
    scheme = SCHEMES[int(torch.randint(len(SCHEMES), ()))]
    results: list[dict[str, Any]] = []
    for backend in ("torch", "triton"):
        copy = p.copy(device=DEVICE) if backend == "triton" else p.copy()
        bounds = boundaries(kind, 36)
        if bounds is not None and kind == "on the device":
            bounds = bounds.to(copy.hidden.device)
        shape = (4, 9) if kind == "rows" else (36,)
        loss, stats = balanced_linear_cross_entropy(
            copy.hidden.view(*shape, 12),
            copy.weight,
            copy.target.view(shape),
            bias=copy.bias,
            scheme=scheme,
            window=5,
            cu_seqlens=bounds,
            num_items=items,
            normalize="token" if items is None else "sequence",
            gradient="sampled" if how == "sampled" else "exact",
            eps=2**-5,
            seed=3,
            backend=backend,
            max_buffer_bytes=6000,
            return_stats=True,
        )
        loss.backward()
        fields = {k: v for k, v in stats._asdict().items() if v is not None}
        assert not any(value.requires_grad for value in fields.values())
        found = {"loss": loss, **fields, **copy.grads()}
        results.append({name: value.detach().cpu() for name, value in found.items()})
    close(results[1], results[0], 1e-5)


def test_the_loss_of_one_graph(problem, close, fresh_compiler):
    def loss_of(hidden: Tensor, weight: Tensor, target: Tensor, bounds: Tensor) -> Tensor:
        return balanced_linear_cross_entropy(
            hidden, weight, target, cu_seqlens=bounds, window=4, backend="triton"
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (13, 18):
        p = problem(rows, 5, 31, dtype=torch.float32, frozen=("weight",)).copy(device=DEVICE)
        bounds = torch.tensor([0, 4, rows], device=DEVICE)
        expected, got = loss_of(*p.args, bounds), compiled(*p.args, bounds)
        close(got.cpu(), expected.cpu(), 1e-6)
        gradients = [torch.autograd.grad(loss, p.hidden)[0].cpu() for loss in (got, expected)]
        close(*gradients, 1e-6)


@pytest.mark.parametrize("rows", [0, 13])
def test_opcheck(rows):
    loss, labelled, bounds = draw((rows, 0), 0.7)
    inputs = (loss.requires_grad_(), labelled, bounds)
    settings = (None, "token", "bft", 4, 1.0, 1e-8, "triton")
    torch.library.opcheck(ops.balanced_loss, (*(x.to(DEVICE) for x in inputs), *settings))


def test_runs_where_the_backend_runs():
    wide = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    narrow = wide.float()
    assert select_balanced_loss("triton", narrow) is balanced_loss
    assert (select_balanced_loss("auto", narrow) is balanced_loss) == (DEVICE == "cuda")
    for name, loss in (("auto", wide), ("triton", wide), ("torch", narrow), ("cpu", narrow)):
        assert select_balanced_loss(name, loss) is not balanced_loss

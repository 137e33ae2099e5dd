"""What must hold of the weights of every device: cases, and checks of a backend's functions.

``run`` is a backend's ``balanced_loss`` on tensors of the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from bft_kernels import reference, weighting
from bft_kernels.config import Weighting
from bft_kernels.results import BalancedLoss

Run = Callable[..., BalancedLoss]  # (loss, labelled, bounds, settings, normalize, items)


def layouts(tile: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Lengths of documents and the part of their positions that carry labels."""
    return {
        "nothing": ((), 1.0),
        "an empty document": ((0,), 1.0),
        "one token": ((1,), 1.0),
        "no label": ((5, 0, 3), 0.0),
        "short": ((0, 3, 0, 0, 17, 1, 2, 0), 0.6),
        "a tile to the last token": ((tile, 2 * tile - 1, 1), 1.0),
        "longer than tiles": ((3, 4 * tile + 5, 7, 0), 0.7),
        "mostly prompt": ((90, 2, 40), 0.1),
    }


def draw(lengths: tuple[int, ...], part: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, labels and boundaries; certain tokens next to hopeless ones."""
    count = sum(lengths)
    labelled = torch.rand(count) < part
    loss = torch.rand(count) * torch.randint(0, 60, (count,))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return torch.where(labelled, loss, 0), labelled, bounds


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


def check_specification(
    run: Run,
    joint: Callable[..., Tensor],  # (loss, labelled, bounds, settings)
    case: tuple[tuple[int, ...], float],
    scheme: str,
    close: Callable[..., None],
) -> None:
    loss, labelled, bounds = draw(*case)
    window = int(torch.tensor([1, 2, 5, 16, 10**12])[torch.randint(5, ())])
    normalize = "sequence" if torch.rand(()) < 0.5 else "token"
    items = torch.tensor(7) if torch.rand(()) < 0.5 else None
    settings = Weighting(scheme, window, 1.7)
    got = run(loss, labelled, bounds, settings, normalize, items)
    expected = plain(loss.double(), labelled, bounds, settings, normalize, items)
    for name, value in zip(got._fields, got, strict=True):
        assert value.dtype == torch.float32, name
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
    token = expected.token_weight
    owner = weighting.labelled_layout(labelled, bounds).sequence
    product = token * expected.sequence_weight[owner] if len(owner) else token
    close(joint(loss, labelled, bounds, settings), product, 1e-6)


def check_small_sums(run: Run, scheme: str, count: int) -> None:
    """Windows keep small sums next to large ones."""
    window = 255
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
    worst = float(error.abs().max())
    assert worst <= 5e-7, worst
    worst = abs(float(got.sequence_confidence) / min(exact) - 1)
    assert worst <= 5e-7, worst


def check_ends_of_the_range(run: Run, scheme: str, tile: int) -> None:
    loss, labelled, bounds = draw((40, 2 * tile, 30, 20, 1), 0.8)
    behind = 40 + 2 * tile
    labelled[[5, 50, behind - 4, behind + 21]] = True
    loss[:40] = torch.where(labelled[:40], 1000.0, 0.0)
    loss[50], loss[70:80], loss[behind - 4] = math.inf, 0.0, 88.0
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
        spoiled = got.sequence_weight.isnan().tolist()
        assert spoiled == [False, False, True, False, False], spoiled


def check_underflow(run: Run) -> None:
    """A confidence that underflows is not zero to its logarithm."""
    loss = torch.full((257,), 0.1)
    loss[100] = 110.0
    every = torch.ones(257, dtype=torch.bool)
    got = run(loss, every, torch.tensor([0, 257]), Weighting("bft-v1-code"))
    lowest = math.exp(-(110.0 + 255 * 0.1) / 256)
    weight = float(got.sequence_weight)
    assert weight == pytest.approx(1 - lowest, rel=1e-6), weight


def check_documents_are_alone(run: Run, scheme: str, tile: int) -> None:
    lengths = (0, 5, 3 * tile, 0, tile + 1, 1, 40)
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
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True)), "another run"


def check_padding(run: Run, scheme: str, tile: int) -> None:
    def check_same(got: BalancedLoss, expected: BalancedLoss) -> None:
        for name, value in zip(got._fields, got, strict=True):
            want = getattr(expected, name)
            assert torch.equal(value[: want.numel()] if value.dim() else value, want), name
            assert value.dim() == 0 or bool((value[want.numel() :] == 0).all()), name

    loss, labelled, bounds = draw((7, 0, tile + 9), 0.7)
    count = loss.numel()
    settings = Weighting(scheme, 6)
    expected = run(loss, labelled, bounds, settings)
    filled = torch.cat([bounds, bounds.new_full((count - 3,), count)])
    check_same(run(loss, labelled, filled, settings), expected)
    # Positions behind the last boundary belong to no document.
    more = torch.full((tile + 3,), 5.0)
    behind = run(torch.cat([loss, more]), torch.cat([labelled, more > 0]), bounds, settings)
    check_same(behind, expected)


def check_no_items(run: Run, scheme: str, tile: int) -> None:
    """0 items in a step without labels; with labels, which nobody looked for, no finite loss."""
    loss, labelled, bounds = draw((7, 0, tile + 9), 0.7)
    for normalize in ("sequence", "token"):
        how = (bounds, Weighting(scheme, 6), normalize, torch.tensor(0))
        for name, value in run(torch.zeros_like(loss), labelled & False, *how)._asdict().items():
            assert not value.any(), name
        assert not run(loss, labelled, *how).loss.isfinite()


# That nobody checked, of 70 positions.
BAD_BOUNDS = [[0, 50, 20, 70], [-9, 10**12, 70], [5, 5, -(2**40)], [5, 5, 70]]

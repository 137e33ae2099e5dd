"""The problems that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """``N`` labelled tokens, hidden size ``D``, vocabulary ``V``."""

    tokens: int
    width: int
    vocabulary: int

    @property
    def flops(self) -> int:
        """Of 1G, one product of all three sizes."""
        return 2 * self.tokens * self.width * self.vocabulary


SHAPES = {
    "tiny": Shape(256, 128, 8192),
    "smollm2-135m": Shape(2048, 576, 49_152),
    "qwen2.5-0.5b": Shape(2048, 896, 151_936),
    "gemma3-270m": Shape(2048, 640, 262_144),
}


@dataclass(frozen=True)
class Recorded:
    """Real inputs: a file of :func:`save_recorded`, cut to so many tokens."""

    path: Path
    tokens: int


Source = Shape | Recorded


def save_recorded(path: Path, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Writes the file that :class:`Recorded` names: ``[N, D]``, ``[V, D]`` and ``[N]``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((hidden.clone(), weight.clone(), target.clone()), path)


@dataclass(frozen=True)
class Problem:
    """Inputs of the loss."""

    hidden: Tensor  # [N, D], requires a gradient
    weight: Tensor  # [V, D], requires a gradient
    target: Tensor  # [N]

    @property
    def shape(self) -> Shape:
        return Shape(*self.hidden.shape, self.weight.shape[0])


def make_problem(source: Source, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """The one set-up of speed and memory measurements: recorded, or synthetic of some shape.

    Synthetic hidden states lean towards their target's row, so that most tokens are confident and
    some are not: with independent normal inputs every distribution would be flat, and no model's
    is.
    """
    if isinstance(source, Recorded):
        hidden, weight, target = torch.load(source.path, weights_only=True, mmap=True)
        return Problem(
            hidden[: source.tokens].to(device, dtype, copy=True).requires_grad_(),
            weight.to(device, dtype, copy=True).requires_grad_(),
            target[: source.tokens].to(device, copy=True),
        )
    shape = source
    generator = torch.Generator().manual_seed(seed)
    scale = shape.width**-0.5
    weight = torch.randn(shape.vocabulary, shape.width, generator=generator) * scale
    target = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator)
    pull = 20 * torch.rand(shape.tokens, 1, generator=generator)
    hidden = 3 * torch.randn(shape.tokens, shape.width, generator=generator)
    hidden += pull * weight[target]
    return Problem(
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        target.to(device),
    )

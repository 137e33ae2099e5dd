"""The problems that are measured."""

from __future__ import annotations

from dataclasses import dataclass

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
    "smollm2-135m": Shape(1024, 576, 49_152),
    "qwen2.5-0.5b": Shape(1024, 896, 151_936),
    "gemma3-270m": Shape(1024, 640, 262_144),
}


@dataclass(frozen=True)
class Problem:
    """Synthetic inputs whose softmax is about as peaked as a trained model's."""

    hidden: Tensor  # [N, D], requires a gradient
    weight: Tensor  # [V, D], requires a gradient
    target: Tensor  # [N]


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """The one set-up of speed and memory measurements.

    Hidden states lean towards their target's row, so that most tokens are confident and some are
    not: with independent normal inputs every distribution would be flat, which no model's is.
    """
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

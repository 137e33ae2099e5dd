"""Shapes of ``python -m benchmarks gpu``, and inputs whose distributions are like text's."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import Problem, Shape

# In order of importance: when time runs out, the last ones are missing.
SHAPES = (
    Shape(8192, 4096, 131_072),
    Shape(8192, 4096, 151_936),
    Shape(4096, 4096, 128_256),
    Shape(16_384, 2048, 248_320),
    Shape(1024, 4096, 128_256),
)
# For the interpreter, which takes about a second for a step of this.
REHEARSAL = (Shape(8, 16, 64),)

_WORKSPACE = 2 * 2**30
_SMALLEST = 1024

# Logits of one token have standard deviation _SPREAD around the frequency of each id, which falls
# as a power of its rank; up to _PULL is added for the target. At V 151,936 that keeps 342, 133 and
# 50 entries a token with eps 2^-12, 2^-10 and 2^-8; confidences are 0.50 in the mean, above 0.9 for
# 40% of tokens, and the nll is 3.3. A 0.5B model on abstracts of PubMed keeps 335, 133 and 50.
_SPREAD, _EXPONENT, _OFFSET, _PULL = 3.3, 1.3, 10, 26.0
# The element of every hidden state that the frequencies are read with.
_CARRIER = 128.0
_ROWS = 8192  # of weight, made at a time


def fit_to(shape: Shape, memory: int) -> Shape:
    """The shape, its tokens and vocabulary halved until a fused loss in 16 bits has room for it.

    Room is needed for inputs and gradients, a gradient of ``weight`` in float32 and 2 GiB.
    """

    def needed(shape: Shape) -> int:
        weight = shape.vocabulary * shape.width
        return 4 * (shape.tokens * shape.width + weight) + 4 * weight + _WORKSPACE

    while needed(shape) > memory and min(shape.tokens, shape.vocabulary) > _SMALLEST:
        shape = Shape(shape.tokens // 2, shape.width, shape.vocabulary // 2)
    return shape


def text_like(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Inputs with frequent and rare ids, certain and uncertain tokens, made on the device.

    How many entries the sampled gradient keeps, and on how few columns they fall, decides what it
    costs: inputs without structure would keep several times as many, spread evenly.
    """
    generator = torch.Generator(device).manual_seed(seed)
    how: dict[str, Any] = {"generator": generator, "device": device}
    rank = torch.arange(1, shape.vocabulary + 1, device=device)  # ids go by rank
    frequency = -_EXPONENT * (rank + _OFFSET).log()  # its logarithm
    weight = torch.empty(shape.vocabulary, shape.width, dtype=dtype, device=device)
    for rows in weight.split(_ROWS):
        rows.copy_(torch.randn(rows.shape, **how) * shape.width**-0.5)
    weight[:, 0] = (frequency - frequency.mean()) / _CARRIER
    target = torch.multinomial(frequency.softmax(0), shape.tokens, True, generator=generator)
    hidden = _SPREAD * torch.randn(shape.tokens, shape.width, **how)
    hidden[:, 0] = _CARRIER
    own, pull = weight[target].float(), _PULL * torch.rand(shape.tokens, 1, **how)
    hidden += pull * own / own.square().sum(1, keepdim=True)
    return Problem(hidden.to(dtype).requires_grad_(), weight.requires_grad_(), target)


@torch.no_grad()
def expected_entries(problem: Problem, eps: float, rows: int = 256) -> float:
    """How many entries a token the sampled gradient is expected to keep, over the first rows."""
    hidden, target = problem.hidden[:rows].float(), problem.target[:rows, None]
    blocks = [hidden @ part.float().T for part in problem.weight.split(_ROWS)]
    kept = torch.cat(blocks, 1).softmax(1).div_(eps).clamp_(max=1)
    kept.scatter_(1, target, 1.0)  # the target's entry is always kept
    return float(kept.sum(1).mean())

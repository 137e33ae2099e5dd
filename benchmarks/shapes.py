"""The problems that are measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.processes import explain


@dataclass(frozen=True)
class Shape:
    """``N`` labelled tokens, hidden size ``D``, vocabulary ``V``."""

    tokens: int
    width: int
    vocabulary: int

    @property
    def flops(self) -> int:
        """The flops of 1G, one product of all three sizes."""
        return 2 * self.tokens * self.width * self.vocabulary


TOKENS = 2048
# The output embeddings of models (benchmarks/README.md has the source of each). Rows of padding are
# included, because they are multiplied like the others.
SHAPES = {
    "tiny": Shape(256, 128, 8192),
    "smollm2-135m": Shape(TOKENS, 576, 49_152),
    "smollm2-360m": Shape(TOKENS, 960, 49_152),
    "smollm2-1.7b": Shape(TOKENS, 2048, 49_152),
    "qwen2.5-0.5b": Shape(TOKENS, 896, 151_936),
    "qwen3-0.6b": Shape(TOKENS, 1024, 151_936),
    "qwen3-4b": Shape(TOKENS, 2560, 151_936),
    "qwen3-8b": Shape(TOKENS, 4096, 151_936),
    "llama3.2-1b": Shape(TOKENS, 2048, 128_256),
    "llama3.2-3b": Shape(TOKENS, 3072, 128_256),
    "llama3.1-8b": Shape(TOKENS, 4096, 128_256),
    "gemma3-270m": Shape(TOKENS, 640, 262_144),
    "gemma3-1b": Shape(TOKENS, 1152, 262_144),
    "gemma3-4b": Shape(TOKENS, 2560, 262_208),
    "mistral-7b-v0.3": Shape(TOKENS, 4096, 32_768),
    "mistral-nemo": Shape(TOKENS, 5120, 131_072),
    "gpt-oss-20b": Shape(TOKENS, 2880, 201_088),
    "deepseek-v3": Shape(TOKENS, 7168, 129_280),
}
# What `gpu` measures, the most important first: if time runs out, the last ones are missing.
ON_A_GPU = (
    Shape(8192, 4096, 131_072),
    Shape(8192, 4096, 151_936),
    Shape(4096, 4096, 128_256),
    Shape(16_384, 2048, 248_320),
    Shape(1024, 4096, 128_256),
)
# For Triton's interpreter, which takes about a second for a step of this shape.
REHEARSAL = (Shape(8, 16, 64),)


def shape_of(text: str) -> Shape:
    """The shape of a head's name, or of sizes, rows x width x vocabulary; ValueError for others."""
    if text in SHAPES:
        return SHAPES[text]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise ValueError(
            f"shapes: got {text!r}, expected rows x width x vocabulary (N x D x V) such as "
            f"1500x320x20000, or some of {', '.join(SHAPES)}"
        )
    return Shape(*map(int, text.split("x")))


def name_of(shape: Shape) -> str:
    """The name of the model with such a head; empty if none of ``SHAPES`` has it."""
    own = (name for name, head in SHAPES.items() if replace(head, tokens=shape.tokens) == shape)
    return next(own, "")


@dataclass(frozen=True)
class Recorded:
    """Real inputs: a file that :func:`load_recorded` reads, and how many of its tokens are used."""

    path: Path
    tokens: int


Source = Shape | Recorded

# Logits of one token have standard deviation _SPREAD around the logarithm of each id's frequency,
# which falls as a power of its rank; up to _PULL is added for the target. At V 151,936 this keeps
# 342, 133 and 50 entries a token with eps 2^-12, 2^-10 and 2^-8. The mean confidence is 0.50, that
# of 40% of the tokens is above 0.9, the nll is 3.3. A 0.5B model on PubMed keeps 335, 133 and 50.
_SPREAD, _EXPONENT, _OFFSET, _PULL = 3.3, 1.3, 10, 26.0
# The element of every hidden state that multiplies the frequencies.
_CARRIER = 128.0
_ROWS = 8192  # so many rows of weight are made at a time
_RECORDED = (
    "expected a file of `python -m benchmarks record`, or of torch.save((hidden, weight, target), "
    "path): hidden [N, D], weight [V, D], int64 target [N] from 0 to V - 1"
)


def load_recorded(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """``hidden [N, D]``, ``weight [V, D]`` and ``target [N]``; ValueError for any other file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of several kinds, for a file that torch.save did not write
        raise ValueError(f"inputs: got {path} ({explain(error)}), {_RECORDED}") from None
    try:
        hidden, weight, target = found
        got = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in found]
        fits = hidden.shape == (*target.shape, *weight.shape[1:]) and hidden.ndim == 2
        fits &= hidden.is_floating_point() and target.dtype == torch.int64 and target.numel() > 0
        fits = fits and 0 <= int(target.min()) <= int(target.max()) < weight.shape[0]
    except (AttributeError, TypeError, ValueError):  # these are not three tensors
        got, fits = [type(found).__name__], False
    if not fits:
        raise ValueError(f"inputs: got {path} with {', '.join(got)}, {_RECORDED}")
    return hidden, weight, target


@dataclass(frozen=True)
class Problem:
    """The inputs of a loss."""

    hidden: Tensor  # [N, D], requires a gradient
    weight: Tensor  # [V, D], requires a gradient
    target: Tensor  # [N]
    # For weightings that depend on documents.
    document: int = 128  # tokens of each document
    window: int = 256

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors that every loss takes."""
        return self.hidden, self.weight, self.target

    @property
    def shape(self) -> Shape:
        tokens, width = self.hidden.shape
        return Shape(tokens, width, self.weight.shape[0])

    def frozen(self) -> Problem:
        """The same inputs with a head that is not trained."""
        return replace(self, weight=self.weight.detach())


def make_problem(source: Source, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Makes the problem for every measurement of speed and memory: recorded, or of some shape.

    Inputs of a shape are synthetic, made by :func:`text_like`.
    """
    if isinstance(source, Shape):
        return text_like(source, dtype, device, seed)
    hidden, weight, target = load_recorded(source.path)
    return Problem(
        hidden[: source.tokens].to(device, dtype, copy=True).requires_grad_(),
        weight.to(device, dtype, copy=True).requires_grad_(),
        target[: source.tokens].to(device, copy=True),
    )


def text_like(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Makes inputs with frequent and rare ids, certain and uncertain tokens, on the device.

    The sampled gradient costs more if it keeps more entries, or if they lie in more columns. Inputs
    without structure would keep several times as many, spread evenly.
    """
    generator = torch.Generator(device).manual_seed(seed)
    how: dict[str, Any] = {"generator": generator, "device": device}
    rank = torch.arange(1, shape.vocabulary + 1, device=device)  # ids are in order of rank
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
    """How many entries a token the sampled gradient should keep on average, for the first rows."""
    hidden, target = problem.hidden[:rows].float(), problem.target[:rows, None]
    blocks = [hidden @ part.float().T for part in problem.weight.split(_ROWS)]
    kept = torch.cat(blocks, 1).softmax(1).div_(eps).clamp_(max=1)
    kept.scatter_(1, target, 1.0)  # the target's entry is always kept
    return float(kept.sum(1).mean())

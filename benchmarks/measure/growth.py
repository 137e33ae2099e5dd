"""Times that grow with tokens and vocabulary as ``a V D + b N V D``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.shapes import Shape


def predict(shape: Shape, fixed: float, slope: float) -> float:
    """``a V D + b N V D``, seconds."""
    return (fixed + slope * shape.tokens) * shape.vocabulary * shape.width


def fit(shapes: list[Shape], times: Sequence[float]) -> tuple[float, float]:
    """``a`` and ``b`` that make the sum of squared relative deviations least."""
    terms: Tensor = torch.tensor(
        [
            [predict(shape, 1, 0) / taken, predict(shape, 0, 1) / taken]
            for shape, taken in zip(shapes, times, strict=True)
        ],
        dtype=torch.float64,
    )
    scale = terms.norm(dim=0)  # a is in seconds an element, b a thousandth of that
    solution = torch.linalg.lstsq(terms / scale, torch.ones(len(shapes), 1, dtype=torch.float64))
    fixed, slope = (solution.solution[:, 0] / scale).tolist()
    return fixed, slope

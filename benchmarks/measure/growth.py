"""Fits times that grow with tokens and vocabulary by ``a V D + b N V D``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.shapes import Shape


def predict(shape: Shape, fixed: float, slope: float) -> float:
    """``a V D + b N V D``, seconds."""
    return (fixed + slope * shape.tokens) * shape.vocabulary * shape.width


def can_fit(shapes: Iterable[Shape]) -> bool:
    """Whether both slopes can be told: there are two values of N, and two of V."""
    sizes = [(shape.tokens, shape.vocabulary) for shape in shapes]
    return all(len(set(values)) > 1 for values in zip(*sizes, strict=True))


def fit(shapes: list[Shape], times: Sequence[float]) -> tuple[float, float]:
    """The ``a`` and ``b`` with the smallest sum of squared relative deviations."""
    each = np.array(times) / [predict(shape, 1, 0) for shape in shapes]  # a + b N
    slope, fixed = np.polyfit([shape.tokens for shape in shapes], each, 1, w=1 / each)
    return float(fixed), float(slope)

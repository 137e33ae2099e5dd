"""Paired differences between arms, over seeds and items; which of them stand out.

A metric of an arm is a matrix ``[S, N]``: a row a seed, a column an item. The items are the same
for each seed, so seeds and items are crossed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LEVEL = 0.05  # of the tests, after Holm; intervals have 1 - LEVEL
POWER = 0.8  # of the minimum detectable effect


@dataclass(frozen=True)
class Difference:
    """The mean of ``a - b``, how sure it is, and how large one would have had to be to be seen."""

    a: str
    b: str
    mean: float
    low: float  # of the interval, without regard to how many contrasts there are
    high: float
    standard_error: float
    detectable: float  # the smallest difference that POWER of such studies would tell from 0
    p: float  # two-sided
    p_holm: float  # over all contrasts of the metric

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {**asdict(self), "says": self.says()}

    def says(self) -> str:
        """The result in words. That two arms do not differ cannot be the result of a test."""
        if self.p_holm < LEVEL:
            return f"{'higher' if self.mean > 0 else 'lower'} by {abs(self.mean):.3g}"
        if not self.standard_error:
            return "not distinguishable; no value differs, so what would have been seen is unknown"
        return (
            f"not distinguishable; an effect of at least {self.detectable:.2g} would have been seen"
        )


def differences(
    pairs: Sequence[tuple[str, str, Matrix, Matrix]], *, draws: int = 10_000, seed: int = 0
) -> list[Difference]:
    """The difference ``a - b`` of each named pair ``(name of a, name of b, a, b)``.

    The interval is that of the percentiles of a bootstrap that draws seeds and, for all of them
    together, items. The p-value is the share of draws that lie further from their mean than 0 does,
    with one more in both counts, so that it is never 0.

    Args:
        pairs: matrices ``[S, N]``, of one shape, without NaN.
        draws: of the bootstrap.
        seed: of its generator.

    Raises:
        ValueError: shapes that differ, no values, or a NaN.
    """
    found = []
    for name_a, name_b, a, b in pairs:
        if a.shape != b.shape or a.ndim != 2 or not a.size or not np.isfinite(a - b).all():
            raise ValueError(
                f"{name_a}, {name_b}: got values of shapes {a.shape} and {b.shape}, expected the "
                "same seeds and items of both, all of them finite"
            )
        difference = a - b
        mean = float(difference.mean())
        drawn = bootstrap(difference, draws, seed)
        error = float(drawn.std(ddof=1))
        low, high = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
        # Sums of draws that are the same number may differ in their last digit.
        further = np.abs(drawn - mean) >= abs(mean) * (1 - 1e-9)
        p = (1 + int(further.sum())) / (1 + draws)
        found.append((name_a, name_b, mean, float(low), float(high), error, detectable(error), p))
    adjusted = holm([row[-1] for row in found])
    return [Difference(*row, p_holm) for row, p_holm in zip(found, adjusted, strict=True)]


def bootstrap(values: Matrix, draws: int, seed: int) -> Matrix:
    """Means ``[draws]`` of crossed draws of rows and columns of ``values [S, N]``.

    Few rows drawn with replacement vary less than rows do, by ``(S - 1) / S``. So the rows' own
    effects are stretched by the root of its inverse first, and those of columns likewise. (Rao and
    Wu, JASA 83, 1988, rescale a bootstrap of few units in this way; Owen, Annals of Applied
    Statistics 1, 2007, is about crossed ones, whose error is on the safe side.)
    """
    rows, columns = values.shape
    mean = values.mean()
    of_rows, of_columns = values.mean(1) - mean, values.mean(0) - mean
    stretched = values + (_stretch(rows) * of_rows)[:, None] + _stretch(columns) * of_columns
    draw = np.random.default_rng(seed)
    means = np.empty(draws, dtype=np.float64)
    for start in range(0, draws, 1000):  # [1000, N] at a time
        size = min(1000, draws - start)
        of_row = draw.multinomial(rows, np.full(rows, 1 / rows), size)  # [size, S]
        of_column = draw.multinomial(columns, np.full(columns, 1 / columns), size)  # [size, N]
        sums = ((of_row @ stretched) * of_column).sum(1)
        means[start : start + size] = sums / (rows * columns)
    return means


def _stretch(count: int) -> float:
    return float(np.sqrt(count / (count - 1)) - 1) if count > 1 else 0.0


def detectable(standard_error: float) -> float:
    """The minimum detectable effect: two-sided at LEVEL, with probability POWER.

    It is NaN where the error is 0: where all values are alike, nothing tells how much they vary.
    """
    if standard_error == 0:
        return math.nan
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * standard_error


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for a family of tests (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, so_far = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted

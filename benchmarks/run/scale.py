"""``python -m benchmarks scale``: how the time of one loss grows with tokens and vocabulary."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from benchmarks.measure.growth import can_fit, fit, predict
from benchmarks.measure.memory import keep_memory
from benchmarks.measure.noise import MOST_SPREAD, Options, check_spread
from benchmarks.measure.timing import bare_product, step, time_turns
from benchmarks.providers.registry import Case, cases, why_not
from benchmarks.results.loss_table import figure, show
from benchmarks.results.schema import append
from benchmarks.shapes import Shape, make_problem

# A shape is measured for so long, because medians of a few short times would be noise.
_LEAST_SECONDS = 3.0
_FIGURES = {
    "N": figure("tokens", ".0f"),
    "D": figure("width", ".0f"),
    "V": figure("vocabulary", ".0f"),
    "seconds": figure("seconds", ".3f"),
    "±": figure("spread", ".0%"),
    "x bare GEMM": lambda row: f"{row['seconds'] / row['bare_product_seconds']:.2f}",
}
_NO_FIT = "no fit: a V D + b N V D needs two or more --tokens and two or more --vocabularies"
_FITTED = {
    "a V D + b N V D": figure("fitted_seconds", ".3f"),
    "off by": lambda row: f"{row['seconds'] / row['fitted_seconds'] - 1:+.1%}",
}


@dataclass(frozen=True)
class Config(Options):
    """Fits the seconds of forward, dH and dW to a V D + b N V D over a grid of N, V and D.

    a is given in passes over dW, the time of doubling a [V, D] tensor in place. b is given as a
    multiple of the bare GEMM's own slope, fitted to its times in the same run. The bare GEMM is in
    blocks of 1024 x 512 here for all shapes, which is not always the fastest, 1G. Nothing is fitted
    without two values of N and two of V.
    """

    provider: str = "bft triton sampled" if torch.cuda.is_available() else "bft cpu sampled"
    weighting: Literal["plain", "dft", "bft"] = "bft"
    mode: Literal["forward", "both", "frozen"] = "both"
    widths: tuple[int, ...] = (576,)
    tokens: tuple[int, ...] = (256, 1024, 4096, 16_384)
    vocabularies: tuple[int, ...] = (32_768, 131_072, 524_288)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    repeats: int = 3
    """At least so many turns; short ones are repeated for three seconds."""
    max_spread: float = MOST_SPREAD
    """Refuse to report if the bare GEMM's interquartile range exceeds this part of its median
    on any shape, or if the machine is busy at the start."""


def main(config: Config) -> None:
    """Measures, fits and prints; SystemExit if the machine is too noisy or a setting is wrong."""
    try:
        (case,) = cases([config.provider], [config.weighting], [config.mode])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    reason = why_not(case, config.device, getattr(torch, config.dtype))
    if reason:
        raise SystemExit(f"providers: got {config.provider!r}, which cannot run here: {reason}")
    facts = config.facts()
    if config.keep_memory:
        keep_memory()
    grid = itertools.product(config.widths, config.vocabularies, config.tokens)
    shapes = [Shape(tokens, width, vocabulary) for width, vocabulary, tokens in grid]
    rows = [_measure(config, case, shape, facts) for shape in shapes]
    told = _fit(shapes, rows) if can_fit(shapes) else _NO_FIT
    figures = _FIGURES | (_FITTED if can_fit(shapes) else {})
    cells = [list(figures), *([write(row) for write in figures.values()] for row in rows)]
    show(f"{case}, {config.dtype}, {config.device}", cells)
    print(told)
    if config.output is not None:
        append(config.output, rows)


def _fit(shapes: list[Shape], rows: list[dict[str, Any]]) -> str:
    """Fills in ``fitted_seconds``; returns a line about the slopes."""
    fixed, slope = fit(shapes, [row["seconds"] for row in rows])
    bare_fixed, bare_slope = fit(shapes, [row["bare_product_seconds"] for row in rows])
    for shape, row in zip(shapes, rows, strict=True):
        row["fitted_seconds"] = predict(shape, fixed, slope)
    # The slope of a pass over dW in V D, which is its seconds an element.
    a_pass = statistics.median(
        row["pass_seconds"] / (row["vocabulary"] * row["width"]) for row in rows
    )
    return (
        f"a: {fixed / a_pass:.2f} passes over dW, {bare_fixed / a_pass:.2f} of them the bare "
        f"product's; b: {slope / bare_slope:.3f} times the bare GEMM's"
    )


def _measure(config: Config, case: Case, shape: Shape, facts: dict[str, Any]) -> dict[str, Any]:
    """A row of times of the loss, the bare GEMM and a pass over dW, in turns."""
    problem = make_problem(shape, getattr(torch, config.dtype), config.device)
    like_gradient = torch.ones_like(problem.weight, requires_grad=False)
    runs: dict[str, Callable[[], object]] = {
        "loss": functools.partial(step, case, problem),
        "bare": functools.partial(bare_product, problem, 1024, 512),
        "pass": functools.partial(like_gradient.mul_, 2),
    }
    times = time_turns(runs, config.device, config.repeats, lasting=_LEAST_SECONDS)
    where = f"N {shape.tokens}, D {shape.width}, V {shape.vocabulary}: "
    check_spread(times["bare"], config.max_spread, config.force, where)
    how = {"dtype": config.dtype, "memory_kept": config.keep_memory}
    row = case.columns | asdict(shape) | how | facts | {"repeats": config.repeats}
    row |= {"seconds": times["loss"].seconds, "spread": times["loss"].spread}
    row["bare_product_seconds"] = times["bare"].seconds
    row["bare_product_spread"] = times["bare"].spread
    return row | {"pass_seconds": times["pass"].seconds, "fitted_seconds": ""}

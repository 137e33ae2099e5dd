"""Panels of what `loss`, `gpu`, `scale` and `train` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps

from benchmarks.measure.growth import fit, predict
from benchmarks.results.figures import (
    Bar,
    Panel,
    bars,
    legend_above,
    ours,
    stacked,
    time_and_memory,
)
from benchmarks.results.schema import PARTS, WEIGHTINGS, Row, finite, grouped, latest, number
from benchmarks.shapes import Shape

Figures = dict[str, list[Panel]]  # by the name of the file
# Rows that agree in these are timed on one problem. Files of `gpu` have no names of shapes.
PROBLEM = ("shape", "tokens", "width", "vocabulary", "dtype", "inputs", "memory_kept")
# And in these, steps of one training.
TRAINED = ("weighting", "model", "mode", "length", "dtype", "gradient_checkpointing")
# And in these, times of one growth.
SCALED = ("provider", "weighting", "mode", "dtype", "memory_kept")
# What the losses of `train` that are this package's are called.
_TRAINED_OURS = ("exact", "sampled")
# 1G is the unit, and the weights alone are no loss.
_NO_LOSSES = ("1G", "bft weighting")
GIB = 2**30
_SIZES = {"tokens": "N", "width": "D", "vocabulary": "V"}


def loss_figures(rows: Sequence[Row]) -> Figures:
    """One a weighting and mode, and one of all that `gpu` wrote: panels of each problem."""
    found: Figures = {}
    for kind, same_kind in grouped(timed(rows), "weighting", "mode").items():
        for same in grouped(same_kind, *PROBLEM).values():
            panels = time_and_memory(problem_title(same[-1]), loss_bars(same))
            found.setdefault("-".join(filter(None, ("loss", *kind))), []).extend(panels)
    return found


def timed(rows: Sequence[Row]) -> list[Row]:
    """Of every loss that was timed and right.

    Those of `gpu`, which times ours balanced beside the peers' mean, have both in their name.
    """
    found: list[Row] = []
    for row in rows:
        right = row.get("status", "ok") == "ok" and finite(number(row, "times_g"))
        if row["provider"] in _NO_LOSSES or not right:
            continue
        if row.get("first_seconds"):
            name = f"{row['provider']}, {row['weighting']} {row['mode']}"
            row = {**row, "provider": name, "weighting": "", "mode": ""}
        found.append(row)
    return found


def loss_bars(rows: Sequence[Row]) -> list[Bar]:
    """Of one problem."""
    found = []
    for row in latest(rows, "provider"):
        extra = number(row, "extra_bytes")
        found.append(
            Bar(
                row["provider"],
                (number(row, "times_g") or 0.0,),
                ours(row["provider"]),
                mebibytes=None if extra is None else extra / 2**20,
            )
        )
    return found


def problem_title(row: Row) -> str:
    """The name and the sizes, and how it was measured."""
    name = f"{row['shape']}, " if row.get("shape") else ""
    parts = [f"N {int(row['tokens']):,}", f"D {int(row['width']):,}", row["dtype"]]
    if row.get("inputs"):
        parts.append(f"{row['inputs']} inputs")
    if row.get("memory_kept") == "True":
        parts.append("memory kept")
    return f"{name}V {int(row['vocabulary']):,}\n{', '.join(parts)}"


def growth_figures(rows: Sequence[Row]) -> Figures:
    """``scale``: seconds against each size that was varied, and the line a V D + b N V D."""
    panels = []
    for same in grouped(rows, *SCALED).values():
        measured = {
            Shape(*(int(row[size]) for size in _SIZES)): number(row, "seconds") or 0.0
            for row in latest(same, *_SIZES)
        }
        for axis, by in (("tokens", "vocabulary"), ("vocabulary", "tokens"), ("width", "tokens")):
            if len({getattr(shape, axis) for shape in measured}) > 1:
                panels.append(_growth(scaled_title(same[0]), measured, axis, by))
    return {"scale": panels} if panels else {}


def scaled_title(row: Row) -> str:
    """The loss of a row of scale.csv."""
    weighting = WEIGHTINGS.get(row.get("weighting", ""), row.get("weighting", ""))
    return ", ".join(filter(None, (row["provider"], weighting, row.get("mode", ""), row["dtype"])))


def _growth(title: str, measured: Mapping[Shape, float], axis: str, by: str) -> Panel:
    """Seconds against one size, a line for each value of another; the third is held."""
    (third,) = set(_SIZES) - {axis, by}
    held = statistics.mode(getattr(shape, third) for shape in measured)
    kept = {shape: t for shape, t in measured.items() if getattr(shape, third) == held}
    steps = sorted({getattr(shape, by) for shape in kept})
    line = fit(list(measured), list(measured.values()))
    title = f"{title}: growth with {_SIZES[axis]}, {_SIZES[third]} {held:,}"

    def draw(axes: Any) -> None:
        # The light end of the colours would not be seen on white.
        shades = colormaps["viridis"](np.linspace(0, 0.8, len(steps)))
        for step, shade, marker in zip(steps, shades, "osD^vP*X" * len(steps), strict=False):
            own = sorted((s for s in kept if getattr(s, by) == step), key=lambda s: s.flops)
            sizes = [getattr(shape, axis) for shape in own]
            label = f"{_SIZES[by]} {step:,}"
            axes.plot(sizes, [kept[s] for s in own], marker, color=shade, label=label)
            between, ends = np.geomspace(min(sizes), max(sizes), 50), {third: held, by: step}
            fitted = [predict(Shape(**ends, **{axis: size}), *line) for size in between]
            axes.plot(between, fitted, color=shade, linewidth=1)
        axes.set(xscale="log", yscale="log", ylabel="seconds")
        axes.set_xlabel(f"{axis}, {_SIZES[axis]}")
        ticks = sorted({getattr(shape, axis) for shape in kept})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25, linewidth=0.5)
        told = "points: measured; lines: a V D + b N V D"
        legend_above(axes, columns=3, title=told, title_fontsize=7.5)

    return Panel(title, 2.9, draw)


def train_figures(rows: Sequence[Row]) -> Figures:
    """``train``: a step's tokens a second; ``parts``: where its time goes; ``batch``: what fits."""
    found: Figures = {}
    steps = [row for row in rows if finite(number(row, "tokens_per_second"))]
    for same in grouped(steps, *TRAINED, "batch").values():
        title = f"{trained_title(same[0])}, batch {same[0]['batch']} x {same[0]['length']} tokens"
        newest = latest(same, "loss")
        speeds = [_trained(row, "tokens_per_second", note=_peak(row)) for row in newest]
        found.setdefault("train", []).append(
            bars(f"{title}\nspeed of a step, and its peak memory", speeds, "tokens/s")
        )
        seconds = [f"{part}_seconds" for part in PARTS]
        told = [row for row in newest if row.get(seconds[0])]  # not in older files
        if told:
            names = [name.replace("_", ", ") for name in PARTS]
            lines = [_trained(row, *seconds) for row in told]
            found.setdefault("parts", []).append(
                stacked(f"{title}\nwhere a step's time goes", lines, names, "seconds")
            )
    largest = [row for row in rows if finite(number(row, "largest_batch"))]
    for same in grouped(largest, *TRAINED, "limit_bytes").values():
        limit = (number(same[0], "limit_bytes") or 0.0) / GIB
        title = f"{trained_title(same[0])}, {same[0]['length']} tokens"
        fitting = [_trained(row, "largest_batch") for row in latest(same, "loss")]
        found.setdefault("batch", []).append(
            bars(f"{title}\nlargest batch in {limit:g} GiB", fitting, "sequences")
        )
    return found


def _trained(row: Row, *columns: str, note: str = "") -> Bar:
    """A loss of train.csv."""
    own = row["loss"].split(" ", 1)[0] in _TRAINED_OURS or ours(row["loss"])
    return Bar(row["loss"], [number(row, column) or 0.0 for column in columns], own, note)


def _peak(row: Row) -> str:
    peak = number(row, "peak_bytes")
    return "" if peak is None else f"{peak / GIB:.1f} GiB"


def trained_title(row: Row) -> str:
    """The model of a row of train.csv, what of it is trained, and how tokens are weighted."""
    weighting = WEIGHTINGS.get(row.get("weighting", ""), row.get("weighting", ""))
    checkpoints = "checkpointed" if row.get("gradient_checkpointing") == "True" else ""
    return ", ".join(filter(None, (row["model"], row.get("mode", ""), checkpoints, weighting)))

"""Makes panels of what `loss`, `gpu`, `scale` and `train` wrote."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps

from benchmarks.measure.growth import can_fit, fit, predict
from benchmarks.results.figures import Bar, Panel, bars, legend_above, ours
from benchmarks.results.schema import PARTS, WEIGHTINGS, Row, digits, grouped, key, latest, number
from benchmarks.shapes import Shape

Figures = dict[str, list[Panel]]  # by the name of the file
# Rows that agree in these were timed on one problem. Files of `gpu` have no names of shapes.
PROBLEM = ("shape", "tokens", "width", "vocabulary", "dtype", "inputs", "memory_kept")
# Rows that agree in these are steps of one training.
TRAINED = ("weighting", "model", "mode", "length", "dtype", "gradient_checkpointing")
# Rows that agree in these are times of one growth.
SCALED = ("provider", "weighting", "mode", "dtype", "memory_kept")
# The names of this package's losses in `train`.
_TRAINED_OURS = ("exact", "sampled")
# 1G is the unit, and the weighting alone is no loss.
_NO_LOSSES = ("1G", "bft weighting")
GIB = 2**30
_SIZES = {"tokens": "N", "width": "D", "vocabulary": "V"}


def loss_figures(rows: Sequence[Row]) -> Figures:
    """Multiples of 1G by problem: a figure for each weighting and mode, and one for `gpu`."""
    found: Figures = defaultdict(list)
    for kind, same_kind in grouped(timed(rows), "weighting", "mode").items():
        for same in grouped(same_kind, *PROBLEM).values():
            given = [
                Bar(row["provider"], [number(row, "times_g")], ours(row["provider"]), _cost(row))
                for row in latest(same, "provider")
            ]
            given.sort(key=lambda bar: bar.values)
            panel = bars(problem_title(same[-1]), given, "time, x G", unit=1.0)
            found["-".join(filter(None, ("loss", *kind)))].append(panel)
    return found


def _cost(row: Row) -> str:
    extra = number(row, "extra_bytes")
    memory = "" if extra is None else f", {extra / 2**20:,.0f} MiB"
    return f"{number(row, 'times_g'):.2f} G{memory}"


def timed(rows: Sequence[Row]) -> list[Row]:
    """The bars of losses that were timed and right.

    `gpu` times ours balanced beside the peers' mean, so its bars have the weighting in their name.
    """
    found: list[Row] = []
    for row in rows:
        right = row.get("status", "ok") == "ok" and number(row, "times_g") is not None
        if row.get("first_seconds"):
            name = f"{row['provider']}, {row['weighting']} {row['mode']}"
            row = {**row, "provider": name, "weighting": "", "mode": ""}
        if right and row["provider"] not in _NO_LOSSES:
            found.append(row)
    return found


def problem_title(row: Row) -> str:
    """The name and sizes of a problem, and how it was measured."""
    name = f"{row['shape']}, " if row.get("shape") else ""
    told = f"N {int(row['tokens']):,}, D {int(row['width']):,}, {row['dtype']}"
    told += f", {row['inputs']} inputs" if row.get("inputs") else ""
    told += ", memory kept" if row.get("memory_kept") == "True" else ""
    return f"{name}V {int(row['vocabulary']):,}\n{told}"


def growth_figures(rows: Sequence[Row]) -> Figures:
    """``scale``: seconds against each size that was varied, and the fitted a V D + b N V D."""
    panels = []
    for same in grouped(rows, *SCALED).values():
        measured = {
            Shape(*(int(row[size]) for size in _SIZES)): number(row, "seconds")
            for row in latest(same, *_SIZES)
        }
        for axis, by in (("tokens", "vocabulary"), ("vocabulary", "tokens"), ("width", "tokens")):
            if len({getattr(shape, axis) for shape in measured}) > 1:
                panels.append(_growth(told(same[0], SCALED[:-1]), measured, axis, by))
    return {"scale": panels} if panels else {}


def _growth(title: str, measured: Mapping[Shape, float], axis: str, by: str) -> Panel:
    """Seconds against one size, a line for each value of another; the third is held."""
    (third,) = set(_SIZES) - {axis, by}
    held = statistics.mode(getattr(shape, third) for shape in measured)
    kept = {shape: t for shape, t in measured.items() if getattr(shape, third) == held}
    steps = sorted({getattr(shape, by) for shape in kept})
    line = fit(list(measured), list(measured.values())) if can_fit(measured) else None
    title = f"{title}: growth with {_SIZES[axis]}, {_SIZES[third]} {held:,}"

    def draw(axes: Any) -> None:
        # The light end of the colours could not be seen on white.
        shades = colormaps["viridis"](np.linspace(0, 0.8, len(steps)))
        for step, shade, marker in zip(steps, shades, "osD^vP*X" * len(steps), strict=False):
            own = sorted((s for s in kept if getattr(s, by) == step), key=lambda s: s.flops)
            sizes = [getattr(shape, axis) for shape in own]
            label = f"{_SIZES[by]} {step:,}"
            axes.plot(sizes, [kept[s] for s in own], marker, color=shade, label=label)
            if line is None:
                continue
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
        heading = f"points: measured{'; lines: a V D + b N V D' if line else ''}"
        legend_above(axes, columns=3, title=heading, title_fontsize=7.5)

    return Panel(title, 2.9, draw)


def train_figures(rows: Sequence[Row]) -> Figures:
    """``train``: a step's tokens a second; ``parts``: where its time goes; ``batch``: what fits."""
    found: Figures = defaultdict(list)
    steps = [row for row in rows if number(row, "tokens_per_second") is not None]
    for same in grouped(steps, *TRAINED, "batch").values():
        title = f"{_training(same[0])}, batch {same[0]['batch']} x {same[0]['length']} tokens"
        newest = latest(same, "loss")
        speeds, told = _trained(newest, "tokens_per_second"), "speed of a step, and its peak memory"
        found["train"].append(bars(f"{title}\n{told}", speeds, "tokens/s"))
        seconds = [f"{part}_seconds" for part in PARTS]
        if parts := _trained([row for row in newest if row.get(seconds[0])], *seconds):
            names = [name.replace("_", ", ") for name in PARTS]
            title += "\nwhere a step's time goes"
            found["parts"].append(bars(title, parts, "seconds", names))
    largest = [row for row in rows if number(row, "largest_batch") is not None]
    for same in grouped(largest, *TRAINED, "limit_bytes").values():
        title = f"{_training(same[0])}, {same[0]['length']} tokens"
        title += f"\nlargest batch in {number(same[0], 'limit_bytes') / GIB:g} GiB"
        fitting = _trained(latest(same, "loss"), "largest_batch")
        found["batch"].append(bars(title, fitting, "sequences"))
    return found


def _trained(rows: Sequence[Row], *columns: str) -> list[Bar]:
    """Bars of losses of train.csv, the largest first; beside a speed stands the peak memory."""
    found = []
    for row in rows:
        own = row["loss"].split(" ", 1)[0] in _TRAINED_OURS or ours(row["loss"])
        values = [number(row, column) or 0.0 for column in columns]
        peak = number(row, "peak_bytes") if columns == ("tokens_per_second",) else None
        text = digits(sum(values)) + ("" if peak is None else f", {peak / GIB:.1f} GiB")
        found.append(Bar(row["loss"], values, own, text))
    return sorted(found, key=lambda bar: -sum(bar.values))


def _training(row: Row) -> str:
    """A row's model, what part of it is trained, and how tokens are weighted."""
    return told(row, ("model", "mode", "gradient_checkpointing", "weighting"))


def told(row: Row, columns: Sequence[str]) -> str:
    """The values of a row in these columns, in words."""
    words = WEIGHTINGS | {"True": "checkpointed", "False": ""}
    return ", ".join(filter(None, (words.get(text, text) for text in key(row, columns))))

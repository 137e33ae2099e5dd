"""``python -m benchmarks plot``: figures of what `loss`, `gpu`, `scale` and `train` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from tyro.conf import Positional

from benchmarks.figures import (
    Panel,
    Point,
    Stack,
    bars,
    legend_above,
    ours,
    render,
    save,
    stacked,
    time_and_memory,
)
from benchmarks.readings import (
    PARTS,
    WEIGHTINGS,
    Row,
    finite,
    grouped,
    key,
    latest,
    number,
    read,
    result_folders,
)
from benchmarks.scale import fit, predict
from benchmarks.shapes import Shape

# Rows that agree in these are timed on one problem. Files of `gpu` have no names of shapes.
PROBLEM = ("shape", "tokens", "width", "vocabulary", "dtype", "inputs", "memory_kept")
# And in these, steps of one training.
TRAINED = ("weighting", "model", "mode", "length", "dtype", "gradient_checkpointing")
# And in these, times of one growth.
SCALED = ("provider", "weighting", "mode", "dtype", "memory_kept")
# What the losses of `train` that are this package's are called.
_TRAINED_OURS = ("exact", "sampled")
_NO_LOSS = "bft weighting"
GIB = 2**30


@dataclass(frozen=True)
class Config:
    """Time against memory, growth, fine-tuning steps and largest batches, as PNG."""

    folders: Positional[tuple[Path, ...]] = ()
    """With loss.csv, scale.csv or train.csv in them; all of benchmarks/results by default."""
    output: Path | None = None
    """Instead of beside the CSVs: a folder, with one below it for each of several `folders`."""


def main(config: Config) -> None:
    """Draws and says what it wrote.

    Raises:
        SystemExit: a folder without a CSV.
    """
    folders = result_folders(config.folders)
    for folder in folders:
        to = folder
        if config.output is not None:
            to = config.output if len(folders) == 1 else config.output / folder.name
        to.mkdir(parents=True, exist_ok=True)
        for name, panels in figures_of(folder).items():
            print(save(render(panels), to / name))


def figures_of(folder: Path) -> dict[str, list[Panel]]:
    """The panels of each figure, by the name of its file; says which CSVs are missing."""
    found: dict[str, list[Panel]] = {}
    parts: dict[str, Callable[[Sequence[Row]], dict[str, list[Panel]]]] = {
        "loss.csv": loss_figures,
        "scale.csv": growth_figures,
        "train.csv": train_figures,
    }
    for file, draw in parts.items():
        rows = read(folder / file)
        if rows:
            found |= draw(rows)
        else:
            print(f"{folder / file}: missing or empty, its figures are left out")
    return found


def losses(rows: Sequence[Row]) -> dict[tuple[str, str], dict[tuple[str, ...], list[Row]]]:
    """Rows of loss.csv by weighting and mode, then by problem; 1G's are in all modes of theirs.

    The weights alone, which are no loss, are left out.
    """
    products = {key(row, PROBLEM): row for row in rows if row["provider"] == "1G"}
    others = [row for row in rows if row["provider"] not in ("1G", _NO_LOSS)]
    order = list(WEIGHTINGS)
    kinds = sorted(
        grouped(others, "weighting", "mode").items(),
        key=lambda kind: order.index(kind[0][0]) if kind[0][0] in order else len(order),
    )
    return {
        (weighting, mode): {
            problem: [
                *([products[problem]] if problem in products else []),
                *latest(same, "provider"),
            ]
            for problem, same in grouped(kind, *PROBLEM).items()
        }
        for (weighting, mode), kind in kinds
    }


def problem_title(row: Row) -> str:
    """The name, or sizes alone."""
    vocabulary = f"V {int(row['vocabulary']):,}"
    return f"{row['shape']}, {vocabulary}" if row.get("shape") else vocabulary


def problem_details(row: Row) -> str:
    """The other sizes, and how it was measured."""
    parts = [f"N {int(row['tokens']):,}", f"D {int(row['width']):,}", row["dtype"]]
    if row.get("inputs"):
        parts.append(f"{row['inputs']} inputs")
    if row.get("memory_kept") == "True":
        parts.append("memory kept")
    return ", ".join(parts)


def loss_points(rows: Sequence[Row]) -> list[Point]:
    """Every provider that was timed and right, without 1G, the unit."""
    points = []
    for row in rows:
        times_g, extra = number(row, "times_g"), number(row, "extra_bytes")
        if row["provider"] == "1G" or row.get("status", "ok") != "ok":
            continue
        if not finite(times_g):
            continue
        points.append(
            Point(
                row["provider"],
                times_g or 0.0,
                ours(row["provider"]),
                None if extra is None else extra / 2**20,
            )
        )
    return points


def loss_panel(rows: Sequence[Row]) -> Panel | None:
    """Time against memory of one problem; None if nothing was timed."""
    points = loss_points(rows)
    if not points:
        return None
    return time_and_memory(f"{problem_title(rows[-1])}\n{problem_details(rows[-1])}", points)


def loss_figures(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """``loss``, or one a weighting and mode where the file tells them: a panel a problem."""
    found: dict[str, list[Panel]] = {}
    for kind, problems in losses(rows).items():
        panels = [panel for same in problems.values() if (panel := loss_panel(same))]
        if panels:
            found["-".join(filter(None, ("loss", *kind)))] = panels
    return found


def growth_figures(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """``scale``: seconds against each size that was varied, and the line a V D + b N V D."""
    panels = []
    for same in grouped(rows, *SCALED).values():
        same = latest(same, "tokens", "width", "vocabulary")
        shapes, times, line = fitted(same)
        measured = dict(zip(shapes, times, strict=True))
        for axis, by in (("tokens", "vocabulary"), ("vocabulary", "tokens"), ("width", "tokens")):
            if len({getattr(shape, axis) for shape in shapes}) > 1:
                panels.append(_growth(scaled_title(same[0]), measured, line, axis, by))
    return {"scale": panels} if panels else {}


def scaled_title(row: Row) -> str:
    """The loss of a row of scale.csv."""
    weighting = WEIGHTINGS.get(row.get("weighting", ""), row.get("weighting", ""))
    return ", ".join(filter(None, (row["provider"], weighting, row.get("mode", ""), row["dtype"])))


def fitted(rows: Sequence[Row]) -> tuple[list[Shape], list[float], tuple[float, float] | None]:
    """Shapes and seconds of rows of scale.csv, and the a and b that fit them, if there are two."""
    shapes = [Shape(*(int(row[c]) for c in ("tokens", "width", "vocabulary"))) for row in rows]
    times = [number(row, "seconds") or 0.0 for row in rows]
    return shapes, times, fit(shapes, times) if len(shapes) > 1 else None


_SIZES = {"tokens": "N", "width": "D", "vocabulary": "V"}


def _growth(
    title: str,
    measured: Mapping[Shape, float],
    line: tuple[float, float] | None,
    axis: str,
    by: str,
) -> Panel:
    """Seconds against one size, a line for each value of another; the third is held."""
    (third,) = set(_SIZES) - {axis, by}
    held = statistics.mode(getattr(shape, third) for shape in measured)
    kept = {shape: t for shape, t in measured.items() if getattr(shape, third) == held}
    steps = sorted({getattr(shape, by) for shape in kept})
    title = f"{title}: growth with {_SIZES[axis]}, {_SIZES[third]} {held:,}"

    def draw(part: Any) -> None:
        axes = part.subplots()
        # The light end of the colours would not be seen on white.
        shades = colormaps["viridis"](np.linspace(0, 0.8, len(steps)))
        for step, shade, marker in zip(steps, shades, "osD^vP*X" * len(steps), strict=False):
            own = sorted((s for s in kept if getattr(s, by) == step), key=lambda s: s.flops)
            sizes = [getattr(shape, axis) for shape in own]
            label = f"{_SIZES[by]} {step:,}"
            axes.plot(sizes, [kept[s] for s in own], marker, color=shade, label=label)
            if line is not None:
                between = np.geomspace(min(sizes), max(sizes), 50)
                ends = {third: held, by: step}
                axes.plot(
                    between,
                    [predict(Shape(**ends, **{axis: x}), *line) for x in between],
                    color=shade,
                    linewidth=1,
                )
        axes.set(xscale="log", yscale="log", ylabel="seconds")
        axes.set_xlabel(f"{axis}, {_SIZES[axis]}")
        ticks = sorted({getattr(shape, axis) for shape in kept})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25, linewidth=0.5)
        drawn = "; lines: a V D + b N V D" if line is not None else ""
        legend_above(axes, columns=3, title=f"points: measured{drawn}", title_fontsize=7.5)

    words = f"{title}: " + "; ".join(
        f"{_SIZES[axis]} {getattr(s, axis):,}, {_SIZES[by]} {getattr(s, by):,}: {t:.3g} s"
        for s, t in kept.items()
    )
    return Panel(title, words, 2.9, draw)


def trained_ours(row: Row) -> bool:
    """Whether a loss of train.csv is this package's."""
    return row["loss"].split(" ", 1)[0] in _TRAINED_OURS or ours(row["loss"])


def train_figures(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """``train``: a step's tokens a second; ``parts``: where its time goes; ``batch``: what fits."""
    found: dict[str, list[Panel]] = {}
    timed = [row for row in rows if finite(number(row, "tokens_per_second"))]
    for same in grouped(timed, *TRAINED, "batch").values():
        points = []
        for row in latest(same, "loss"):
            peak = number(row, "peak_bytes")
            note = "" if peak is None else f"{peak / GIB:.1f} GiB"
            value = number(row, "tokens_per_second") or 0.0
            points.append(Point(row["loss"], value, trained_ours(row), note=note))
        title = f"{trained_title(same[0])}, batch {same[0]['batch']} x {same[0]['length']} tokens"
        found.setdefault("train", []).append(
            bars(f"{title}\nspeed of a step, and its peak memory", points, "tokens/s")
        )
        lines = [
            Stack(row["loss"], parts, trained_ours(row))
            for row in latest(same, "loss")
            if (parts := parts_of(row)) is not None
        ]
        if lines:
            names = [name.replace("_", ", ") for name in PARTS]
            found.setdefault("parts", []).append(
                stacked(f"{title}\nwhere a step's time goes", lines, names, "seconds")
            )
    largest = [row for row in rows if finite(number(row, "largest_batch"))]
    for same in grouped(largest, *TRAINED, "limit_bytes").values():
        points = [
            Point(row["loss"], number(row, "largest_batch") or 0.0, trained_ours(row))
            for row in latest(same, "loss")
        ]
        limit = (number(same[0], "limit_bytes") or 0.0) / GIB
        title = f"{trained_title(same[0])}, {same[0]['length']} tokens"
        found.setdefault("batch", []).append(
            bars(f"{title}\nlargest batch in {limit:g} GiB", points, "sequences")
        )
    return found


def parts_of(row: Row) -> list[float] | None:
    """Seconds of a step's parts; None in files that do not tell them."""
    parts = [number(row, f"{part}_seconds") for part in PARTS]
    return None if None in parts else [part or 0.0 for part in parts]


def trained_title(row: Row) -> str:
    """The model of a row of train.csv, what of it is trained, and how tokens are weighted."""
    weighting = WEIGHTINGS.get(row.get("weighting", ""), row.get("weighting", ""))
    checkpoints = "checkpointed" if row.get("gradient_checkpointing") == "True" else ""
    return ", ".join(filter(None, (row["model"], row.get("mode", ""), checkpoints, weighting)))

"""What all figures share: one narrow column of panels, colours, numbered points, bars and files.

A figure is as wide as a phone whatever it shows, so that its letters are never scaled below what
can be read; panels are stacked. What is ours has a colour and is filled, peers are grey and hollow:
they differ without colours too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.readings import digits

_WIDTH = 3.6  # inches
_DPI = 200  # of a PNG
_INK = "#222222"
_PEER = "#666666"
# Okabe and Ito's, which the colour-blind can tell apart; by a word of the provider's name.
_OURS = {"triton": "#D55E00", "cuda": "#009E73", "torch": "#CC79A7"}
_OTHER_OURS = "#0072B2"
# Of the parts of a bar: neighbours differ in lightness and by hatches.
_PARTS = (
    ("#bbbbbb", ""),
    ("#E69F00", "////"),
    ("#D55E00", ""),
    ("#999999", "////"),
    ("#56B4E9", ""),
)
_ROW = 0.25  # inches of a bar and of its line of text
_AXIS = 0.5  # inches of the axis below bars
_LINE = 0.16  # inches of a line of a title
_LETTERS = 44  # that a line of a title has room for
_MARK = 11.0  # diameter of a numbered point, in points
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,  # a $ in a name is a $
}


@dataclass(frozen=True)
class Panel:
    """One part of a figure."""

    title: str
    words: str  # what it shows, for those who do not see it
    height: float  # inches, without the title
    # Draws into a subfigure, and returns what can be placed only once the layout is known.
    draw: Callable[[Any], Callable[[], None] | None]


@dataclass(frozen=True)
class Point:
    """One provider."""

    label: str
    value: float
    ours: bool
    mebibytes: float | None = None  # extra memory
    note: str = ""  # beside the value


@dataclass(frozen=True)
class Stack:
    """A bar made of parts."""

    label: str
    values: Sequence[float]
    ours: bool


def ours(provider: str) -> bool:
    """Whether a provider is this package."""
    return provider.split(" ", 1)[0] == "bft"


def colour(point: Point) -> str:
    """One for each backend of ours, one for all peers."""
    if not point.ours:
        return _PEER
    return next((c for word, c in _OURS.items() if word in point.label.split()), _OTHER_OURS)


def wide(numbers: Sequence[float]) -> bool:
    """Whether a linear axis would squash the small ones, and a logarithmic one can show them."""
    return max(numbers) > 20 * min(numbers) > 0


def render(panels: Sequence[Panel]) -> Figure:
    """All panels, one below the other.

    Raises:
        ValueError: there are none.
    """
    if not panels:
        raise ValueError("panels: got none, expected some")
    titles = [
        [short for line in panel.title.splitlines() for short in textwrap.wrap(line, _LETTERS)]
        for panel in panels
    ]
    heights = [
        panel.height + _LINE * (1 + len(lines)) for panel, lines in zip(panels, titles, strict=True)
    ]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="white")
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        after = []
        for panel, lines, part in zip(panels, titles, parts, strict=True):
            part.suptitle("\n".join(lines), fontsize=8.5, fontweight="bold", x=0.02, ha="left")
            after.append(panel.draw(part))
        figure.draw_without_rendering()  # lays out, once
        figure.set_layout_engine("none")
        for place in after:
            if place is not None:
                place()
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, which changes with what it shows only; returns its name."""
    written = path.with_suffix(".png")
    with rc_context(_STYLE):
        figure.savefig(written, dpi=_DPI, metadata={"Software": None})
    return written


def time_and_memory(title: str, points: Sequence[Point]) -> Panel:
    """Multiples of 1G against memory, and below it the same as bars, which name the numbers.

    Args:
        title: the problem's.
        points: values in multiples of 1G; those without memory are in the bars alone.
    """
    ranked = sorted(points, key=lambda point: point.value)
    placed = {i: p for i, p in enumerate(ranked, 1) if p.mebibytes is not None}
    lower = _AXIS + _ROW * len(ranked)
    upper = 2.4 if placed else 0.0

    def draw(part: Any) -> Callable[[], None] | None:
        # Subfigures: each has margins of its own.
        ratios = [upper, lower] if placed else [lower]
        parts = part.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        names = [f"{number}  {point.label}" for number, point in enumerate(ranked, 1)]
        texts = [f"{point.value:.2f} G{_memory(point)}" for point in ranked]
        _bars(parts[-1].subplots(), names, ranked, texts, "time, x G", reference=1.0)
        return _scatter(parts[0].subplots(), placed) if placed else None

    fastest, slowest = ranked[0], ranked[-1]
    words = (
        f"{title}: time in multiples of the bare product against extra memory, from "
        f"{fastest.label}, {fastest.value:.2f}, to {slowest.label}, {slowest.value:.2f}"
    )
    return Panel(title, words, upper + lower, draw)


def bars(title: str, points: Sequence[Point], label: str) -> Panel:
    """Values of one kind, the smallest last; a note stands beside its value."""
    ranked = sorted(points, key=lambda point: -point.value)
    words = f"{title}, {label}: " + "; ".join(f"{p.label} {digits(p.value)}" for p in ranked)

    def draw(part: Any) -> None:
        names = [point.label for point in ranked]
        texts = [", ".join(filter(None, (digits(point.value), point.note))) for point in ranked]
        _bars(part.subplots(), names, ranked, texts, label)

    return Panel(title, words, _AXIS + _ROW * len(ranked), draw)


def stacked(title: str, lines: Sequence[Stack], parts: Sequence[str], label: str) -> Panel:
    """Bars made of parts, in the parts' order; the longest first."""
    ranked = sorted(lines, key=lambda line: -sum(line.values))
    words = f"{title}, {label}: " + "; ".join(
        f"{line.label} {digits(sum(line.values))}, of which "
        + ", ".join(
            f"{part} {digits(value)}" for part, value in zip(parts, line.values, strict=True)
        )
        for line in ranked
    )

    def draw(part: Any) -> None:
        axes = part.subplots()
        places = np.arange(len(ranked))
        starts = np.zeros(len(ranked))
        # Light to dark would say more or less; hatches tell neighbours apart without colours too.
        for index, name in enumerate(parts):
            values = np.array([line.values[index] for line in ranked])
            colour_, hatch = _PARTS[index % len(_PARTS)]
            axes.barh(
                places, values, 0.35, starts, label=name, color=colour_, hatch=hatch,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            starts += values
        texts = [digits(total) for total in starts]
        _names(axes, [line.label for line in ranked], texts, [line.ours for line in ranked])
        axes.set_xlim(0, max(starts))
        axes.set_xlabel(label)
        legend_above(axes, columns=2)

    legend = _LINE * (1 + (len(parts) + 1) // 2)
    return Panel(title, words, _AXIS + _ROW * len(ranked) + legend, draw)


def legend_above(axes: Any, columns: int, **more: Any) -> None:
    """Between the title and the axes, from the left."""
    axes.legend(
        fontsize=7.5,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        frameon=False,
        alignment="left",
        **more,
    )


def _memory(point: Point) -> str:
    return "" if point.mebibytes is None else f", {point.mebibytes:,.0f} MiB"


def _bars(
    axes: Any,
    names: Sequence[str],
    points: Sequence[Point],
    texts: Sequence[str],
    label: str,
    reference: float | None = None,
) -> None:
    """Horizontal, the first on top; the name and the text of each stand above it."""
    numbers = [point.value for point in points]
    places = np.arange(len(points))
    axes.barh(
        places,
        numbers,
        height=0.35,
        color=[colour(point) if point.ours else "#d9d9d9" for point in points],
        edgecolor=[colour(point) for point in points],
    )
    _names(axes, names, texts, [point.ours for point in points])
    if reference is not None:
        axes.axvline(reference, color=_INK, linestyle=":", linewidth=1, zorder=0)
    if wide(numbers):
        axes.set_xscale("log")
        axes.set_xlim(min(numbers) / 1.5, max(numbers))
    else:
        axes.set_xlim(0, max(numbers))
    axes.set_xlabel(label)


def _names(axes: Any, names: Sequence[str], texts: Sequence[str], own: Sequence[bool]) -> None:
    """Above each of several horizontal bars its name, on the left, and its text, on the right."""
    for place, (name, text, bold) in enumerate(zip(names, texts, own, strict=True)):
        for x, words, side in ((0, name, "left"), (1, text, "right")):
            axes.annotate(
                words,
                (x, place - 0.22),
                xycoords=("axes fraction", "data"),
                ha=side,
                va="bottom",
                fontsize=7.5,
                fontweight="bold" if bold else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            ).set_in_layout(False)  # it is inside the axes, and measuring it takes long
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.6, -0.95)


def _scatter(axes: Any, points: dict[int, Point]) -> Callable[[], None]:
    """Multiples of 1G against memory; returns what writes the numbers."""
    numbers = [1.0, *(point.value for point in points.values())]
    memory = [max(1.0, point.mebibytes or 0.0) for point in points.values()]
    axes.set_xscale("log")
    axes.set_xlim(min(memory) / 1.5, max(memory) * 1.5)
    if wide(numbers):
        axes.set_yscale("log")
        axes.set_ylim(min(numbers) / 1.3, max(numbers) * 1.3)
    else:
        axes.set_ylim(0, 1.08 * max(numbers))
    axes.axhline(1.0, color=_INK, linestyle=":", linewidth=1)
    axes.annotate(
        "bare product, 1G", (1, 1.0), (0, -2), ("axes fraction", "data"), "offset points",
        fontsize=7.5, ha="right", va="top",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("peak memory beyond inputs and gradients, MiB")
    axes.set_ylabel("time, x G")
    axes.grid(alpha=0.25, linewidth=0.5)
    values = [point.value for point in points.values()]

    def place() -> None:
        to_points = 72 / axes.figure.get_dpi()
        at = axes.transData.transform(np.column_stack([memory, values])) * to_points
        box = axes.get_window_extent()
        low, high = np.array([box.p0, box.p1]) * to_points
        shifts = apart(at, _MARK + 1, low + _MARK / 2, high - _MARK / 2) - at
        for (number, point), x, y, shift in zip(
            points.items(), memory, values, shifts, strict=True
        ):
            axes.plot(x, y, ".", color=colour(point), markersize=4)
            axes.annotate(
                str(number),
                (x, y),
                tuple(shift),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if point.ours else _INK,
                bbox={
                    "boxstyle": f"circle,pad={0.25 if number < 10 else 0.12}",
                    "facecolor": colour(point) if point.ours else "white",
                    "edgecolor": colour(point),
                    "linewidth": 0.8,
                },
                arrowprops={"arrowstyle": "-", "color": colour(point), "linewidth": 0.7},
            ).set_in_layout(False)

    return place


def apart(at: np.ndarray, distance: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Places near ``at`` that are this far from each other, as far as the box has room.

    Args:
        at: [n, 2].
        distance: of two places, in the units of ``at``.
        low: the box's lower left corner, [2].
        high: its upper right corner, [2].
    """
    places = np.clip(at.astype(float), low, high)
    # Two at one place would not know where to go: each starts off a little in its own direction.
    turns = 2.4 * np.arange(len(places))
    places += 1e-3 * distance * np.column_stack([np.cos(turns), np.sin(turns)])
    for _ in range(500):
        away = places[:, None] - places[None]  # [n, n, 2]
        length = np.linalg.norm(away, axis=2) + np.eye(len(places)) * 2 * distance
        overlap = np.maximum(0.0, distance - length)
        if not overlap.any():
            break
        push = away / np.maximum(length, 1e-9)[..., None] * overlap[..., None]
        places = np.clip(places + 0.5 * push.sum(axis=1), low, high)
    return places

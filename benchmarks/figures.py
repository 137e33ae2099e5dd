"""What all figures share: one narrow column of panels, colours, numbered points, bars and files.

A figure is 5 inches wide whatever it shows, so that a phone shows its letters at about their size;
panels are stacked. What is ours has a colour and is filled, peers are grey and hollow: they differ
without colours too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

_WIDTH = 5.0  # inches
_DPI = 150  # of a PNG
_INK = "#222222"
_PEER = "#666666"
# Okabe and Ito's, which the colour-blind can tell apart; by a word of the provider's name.
_OURS = {"triton": "#D55E00", "cuda": "#009E73", "torch": "#CC79A7"}
_OTHER_OURS = "#0072B2"
_BAR = 0.19  # inches
_FRAME = 0.75  # inches of title and axis around bars
_MARK = 11.0  # diameter of a numbered point, in points
_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # letters stay text: smaller, and can be searched and read aloud
    "svg.hashsalt": "bft",  # the same figure gives the same file
}


@dataclass(frozen=True)
class Panel:
    """One part of a figure."""

    title: str
    words: str  # what it shows, for those who do not see it
    height: float  # inches
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
    heights = [panel.height for panel in panels]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="white")
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)
        after = []
        for panel, part in zip(panels, parts[:, 0], strict=True):
            part.suptitle(panel.title, fontsize=9, fontweight="bold", x=0.02, ha="left")
            after.append(panel.draw(part))
        figure.draw_without_rendering()  # lays out
        for place in after:
            if place is not None:
                place()
    return figure


def save(figure: Figure, path: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Writes the figure with each suffix, without a date, so that files change with data only."""
    written = [path.with_suffix(f".{suffix}") for suffix in suffixes]
    with rc_context(_STYLE):
        for file in written:
            nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            metadata = nameless if file.suffix == ".svg" else {"Software": None}
            figure.savefig(file, dpi=_DPI, metadata=metadata)
    return written


def time_and_memory(title: str, points: Sequence[Point]) -> Panel:
    """Multiples of 1G against memory, and below it the same as bars, which name the numbers.

    Args:
        title: the problem's.
        points: values in multiples of 1G; those without memory are in the bars alone.
    """
    ranked = sorted(points, key=lambda point: point.value)
    placed = {i: p for i, p in enumerate(ranked, 1) if p.mebibytes is not None}
    names = [f"{point.label}  {i}" for i, point in enumerate(ranked, 1)]
    notes = ["" if p.mebibytes is None else f"{p.mebibytes:,.0f} MiB" for p in ranked]
    lower = _FRAME + _BAR * len(ranked)
    upper = 2.9 if placed else 0.0

    def draw(part: Any) -> Callable[[], None] | None:
        # Subfigures, since the names of bars would narrow the other axes as well.
        ratios = [upper, lower] if placed else [lower]
        parts = part.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        _bars(parts[-1].subplots(), names, ranked, notes, "time, x G", reference=1.0)
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
    words = f"{title}, {label}: " + "; ".join(f"{p.label} {p.value:,.4g}" for p in ranked)

    def draw(part: Any) -> None:
        names, notes = [point.label for point in ranked], [point.note for point in ranked]
        _bars(part.subplots(), names, ranked, notes, label)

    return Panel(title, words, _FRAME + _BAR * len(ranked), draw)


def _bars(
    axes: Any,
    names: Sequence[str],
    points: Sequence[Point],
    notes: Sequence[str],
    label: str,
    reference: float | None = None,
) -> None:
    """Horizontal, the first on top, each with its value and its note."""
    numbers = [point.value for point in points]
    drawn = axes.barh(
        range(len(points)),
        numbers,
        color=[colour(point) if point.ours else "#d9d9d9" for point in points],
        edgecolor=[colour(point) for point in points],
    )
    form = "{:.2f}" if reference is not None else "{:,.4g}"
    texts = [
        "  ".join(filter(None, (form.format(value), note)))
        for value, note in zip(numbers, notes, strict=True)
    ]
    axes.bar_label(drawn, texts, fontsize=7.5, padding=3)
    axes.set_yticks(range(len(points)), names)
    for text, point in zip(axes.get_yticklabels(), points, strict=True):
        text.set_fontweight("bold" if point.ours else "normal")
        text.set_fontsize(7.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if reference is not None:
        axes.axvline(reference, color=_INK, linestyle=":", linewidth=1)
    room = 1.7  # of the axis, for the labels
    if wide(numbers):
        left = min(numbers) / 1.5
        axes.set_xscale("log")
        axes.set_xlim(left, left * (max(numbers) / left) ** room)
    else:
        axes.set_xlim(0, room * max(numbers))
    axes.set_xlabel(label)


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


def finite(value: float | None) -> bool:
    """Whether a figure can show this."""
    return value is not None and math.isfinite(value)

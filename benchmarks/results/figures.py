"""What all figures share: one narrow column of panels, colours, bars, numbered points and files.

A figure is as wide as a phone whatever it shows, so that its letters are never scaled below what
can be read. What is ours has a colour and is filled, peers are grey and hollow.
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

from benchmarks.results.schema import digits

_WIDTH = 3.6  # inches
_DPI = 200
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
STYLE: dict[Any, Any] = {
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
    height: float  # inches, without the title
    draw: Callable[[Any], None]  # into axes


@dataclass(frozen=True)
class Bar:
    """One provider, of one value or of parts that add up."""

    label: str
    values: Sequence[float]
    ours: bool
    note: str = ""  # beside the value
    mebibytes: float | None = None  # extra memory

    @property
    def value(self) -> float:
        return float(sum(self.values))


def ours(provider: str) -> bool:
    """Whether a provider is this package."""
    return provider.split(" ", 1)[0] == "bft"


def colour(bar: Bar) -> str:
    """One for each backend of ours, one for all peers."""
    if not bar.ours:
        return _PEER
    return next((c for word, c in _OURS.items() if word in bar.label.split()), _OTHER_OURS)


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
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="white")
        # Subfigures: each has margins of its own.
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, lines, part in zip(panels, titles, parts, strict=True):
            part.suptitle("\n".join(lines), fontsize=8.5, fontweight="bold", x=0.02, ha="left")
            panel.draw(part.subplots())
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, which changes with what it shows only; returns its name."""
    written = path.with_suffix(".png")
    with rc_context(STYLE):
        figure.savefig(written, dpi=_DPI, metadata={"Software": None})
    return written


def time_and_memory(title: str, given: Sequence[Bar]) -> list[Panel]:
    """Multiples of 1G against memory, and the same as bars, which name the numbers.

    Args:
        title: the problem's.
        given: values in multiples of 1G; those without memory are in the bars alone.
    """
    ranked = sorted(given, key=lambda bar: bar.value)
    placed = {i: bar for i, bar in enumerate(ranked, 1) if bar.mebibytes is not None}

    def scatter(axes: Any) -> None:
        for number, bar in placed.items():
            at, face = (max(1.0, bar.mebibytes or 0.0), bar.value), colour(bar)
            axes.plot(*at, "o", color=face, markerfacecolor=face if bar.ours else "white")
            aside = (4, 3 if number % 2 else -8)  # neighbours in time may be at one place
            axes.annotate(str(number), at, aside, textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel="peak memory beyond inputs and gradients, MiB")
        _scale_of(axes, "y", [1.0, *(bar.value for bar in placed.values())])
        axes.axhline(1.0, color=_INK, linestyle=":", linewidth=1)
        axes.set_ylabel("time, x G")
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    names = [f"{number}  {bar.label}" for number, bar in enumerate(ranked, 1)]
    texts = [
        f"{bar.value:.2f} G" + ("" if bar.mebibytes is None else f", {bar.mebibytes:,.0f} MiB")
        for bar in ranked
    ]

    def draw(axes: Any) -> None:
        _bars(axes, names, ranked, texts, "time, x G")
        axes.axvline(1.0, color=_INK, linestyle=":", linewidth=1, zorder=0)

    height = _AXIS + _ROW * len(ranked)
    return [*([Panel(title, 2.4, scatter)] if placed else []), Panel(title, height, draw)]


def bars(title: str, given: Sequence[Bar], label: str) -> Panel:
    """Values of one kind, the smallest last; a note stands beside its value."""
    ranked = sorted(given, key=lambda bar: -bar.value)
    texts = [", ".join(filter(None, (digits(bar.value), bar.note))) for bar in ranked]

    def draw(axes: Any) -> None:
        _bars(axes, [bar.label for bar in ranked], ranked, texts, label)

    return Panel(title, _AXIS + _ROW * len(ranked), draw)


def stacked(title: str, given: Sequence[Bar], parts: Sequence[str], label: str) -> Panel:
    """Bars made of parts, in the parts' order; the longest first."""
    ranked = sorted(given, key=lambda bar: -bar.value)

    def draw(axes: Any) -> None:
        starts = np.zeros(len(ranked))
        # Light to dark would say more or less; hatches tell neighbours apart without colours too.
        for index, name in enumerate(parts):
            values = np.array([bar.values[index] for bar in ranked])
            face, hatch = _PARTS[index % len(_PARTS)]
            how = {"label": name, "color": face, "hatch": hatch, "edgecolor": "white"}
            axes.barh(range(len(ranked)), values, 0.35, starts, linewidth=0.5, **how)
            starts += values
        _names(axes, [bar.label for bar in ranked], [digits(total) for total in starts], ranked)
        axes.set_xlim(0, max(starts))
        axes.set_xlabel(label)
        legend_above(axes, columns=2)

    legend = _LINE * (1 + (len(parts) + 1) // 2)
    return Panel(title, _AXIS + _ROW * len(ranked) + legend, draw)


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


def _scale_of(axes: Any, axis: str, numbers: Sequence[float]) -> None:
    """Logarithmic where a linear axis would squash the small ones, if all are positive."""
    wide = max(numbers) > 20 * min(numbers) > 0
    limits = (min(numbers) / 1.5, max(numbers)) if wide else (0, max(numbers))
    top = limits[1] * (1.08 if axis == "y" else 1)
    axes.set(**{f"{axis}scale": "log" if wide else "linear", f"{axis}lim": (limits[0], top)})


def _bars(
    axes: Any, names: Sequence[str], given: Sequence[Bar], texts: Sequence[str], label: str
) -> None:
    """Horizontal, the first on top; the name and the text of each stand above it."""
    colours = [colour(bar) for bar in given]
    faces = [own if bar.ours else "#d9d9d9" for own, bar in zip(colours, given, strict=True)]
    numbers = [bar.value for bar in given]
    axes.barh(range(len(given)), numbers, height=0.35, color=faces, edgecolor=colours)
    _names(axes, names, texts, given)
    _scale_of(axes, "x", numbers)
    axes.set_xlabel(label)


def _names(axes: Any, names: Sequence[str], texts: Sequence[str], given: Sequence[Bar]) -> None:
    """Above each of several horizontal bars its name, on the left, and its text, on the right."""
    for place, (name, text, bar) in enumerate(zip(names, texts, given, strict=True)):
        for x, words, side in ((0, name, "left"), (1, text, "right")):
            axes.annotate(
                words,
                (x, place - 0.22),
                xycoords=("axes fraction", "data"),
                ha=side,
                va="bottom",
                fontsize=7.5,
                fontweight="bold" if bar.ours else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            ).set_in_layout(False)  # it is inside the axes, and measuring it takes long
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.6, -0.95)

"""What all figures share: one narrow column of panels, colours, bars and files.

Every figure is as wide as a phone, so that its letters are never scaled until they cannot be read.
Ours has a colour; peers are grey.
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

_WIDTH = 3.6  # inches
_INK = "#222222"
_PEER = "#666666"
# Colours of Okabe and Ito, for the colour-blind, by a word of the provider's name.
_OURS = {"triton": "#D55E00", "cuda": "#009E73", "torch": "#CC79A7"}
_OTHER_OURS = "#0072B2"
# The colours and hatches of a bar's parts: neighbours differ in lightness and in hatches.
_PARTS = {"#bbbbbb": "", "#E69F00": "////", "#D55E00": "", "#999999": "////", "#56B4E9": ""}
_ROW = 0.25  # inches of a bar and of its line of text
_AXIS = 0.5  # inches of the axis below bars
_LINE = 0.16  # inches of a line of a title
_LETTERS = 44  # for so many a line of a title has room
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,  # a $ in a name stays a $
}


@dataclass(frozen=True)
class Panel:
    """One part of a figure."""

    title: str
    height: float  # inches, without the title
    draw: Callable[[Any], None]  # into axes


@dataclass(frozen=True)
class Bar:
    """The bar of one provider, with one value or with parts that add up."""

    label: str
    values: Sequence[float]
    ours: bool
    text: str = ""


def ours(provider: str) -> bool:
    """Whether a provider is this package."""
    return provider.split(" ", 1)[0] == "bft"


def colour(bar: Bar) -> str:
    """The colour: one for each backend of ours, one for all peers."""
    if not bar.ours:
        return _PEER
    return next((c for word, c in _OURS.items() if word in bar.label.split()), _OTHER_OURS)


def render(panels: Sequence[Panel]) -> Figure:
    """Draws all panels, one below the other; ValueError if there are none."""
    if not panels:
        raise ValueError("panels: got none, expected some")
    titles = [
        "\n".join(textwrap.fill(line, _LETTERS) for line in panel.title.splitlines())
        for panel in panels
    ]
    drawn = list(zip(panels, titles, strict=True))
    heights = [panel.height + _LINE * (2 + title.count("\n")) for panel, title in drawn]
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="white")
        # Subfigures, because each has its own margins.
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for (panel, title), part in zip(drawn, parts, strict=True):
            part.suptitle(title, fontsize=8.5, fontweight="bold", x=0.02, ha="left")
            panel.draw(part.subplots())
    return figure


def save(figure: Figure, path: Path, dpi: int = 200) -> Path:
    """Writes a PNG, which changes only if what it shows does; returns its path."""
    written = path.with_suffix(".png")
    with rc_context(STYLE):
        figure.savefig(written, dpi=dpi, metadata={"Software": None})
    return written


def bars(
    title: str,
    given: Sequence[Bar],
    label: str,  # of the axis
    parts: Sequence[str] = (),  # the names of a bar's parts, if it has several
    unit: float | None = None,  # a value to mark with a line
) -> Panel:
    """Horizontal bars, the first on top; the name and the text of each stand above it."""
    rows, totals = range(len(given)), [sum(bar.values) for bar in given]

    def draw(axes: Any) -> None:
        if parts:
            _stack(axes, given, parts)
            axes.set_xlim(0, max(totals))
            legend_above(axes, columns=2)
        else:
            faces = [colour(bar) if bar.ours else "#d9d9d9" for bar in given]
            axes.barh(rows, totals, 0.35, color=faces, edgecolor=list(map(colour, given)))
            _scale_of(axes, totals)
        if unit is not None:
            axes.axvline(unit, color=_INK, linestyle=":", linewidth=1, zorder=0)
        _names(axes, given)
        axes.set_xlabel(label)

    legend = _LINE * (1 + (len(parts) + 1) // 2) if parts else 0
    return Panel(title, _AXIS + _ROW * len(given) + legend, draw)


def _stack(axes: Any, given: Sequence[Bar], parts: Sequence[str]) -> None:
    """Stacks the parts of each bar; hatches tell neighbours apart without colours, too."""
    starts = np.zeros(len(given))
    for index, (name, (face, hatch)) in enumerate(zip(parts, _PARTS.items(), strict=False)):
        values = np.array([bar.values[index] for bar in given])
        how = {"label": name, "color": face, "hatch": hatch, "edgecolor": "white"}
        axes.barh(range(len(given)), values, 0.35, starts, linewidth=0.5, **how)
        starts += values


def legend_above(axes: Any, columns: int, **more: Any) -> None:
    """Puts the legend between the title and the axes, on the left."""
    where = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "alignment": "left"}
    axes.legend(fontsize=7.5, ncols=columns, frameon=False, **where, **more)


def _scale_of(axes: Any, numbers: Sequence[float]) -> None:
    """Makes the axis logarithmic if a linear one would squash small numbers and none is <= 0."""
    if max(numbers) > 20 * min(numbers) > 0:
        axes.set(xscale="log", xlim=(min(numbers) / 1.5, max(numbers)))
    else:
        axes.set_xlim(0, max(numbers))


def _names(axes: Any, given: Sequence[Bar]) -> None:
    """Writes above each horizontal bar its name, on the left, and its text, on the right."""
    how = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 7.5}
    how["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    for place, bar in enumerate(given):
        how["fontweight"] = "bold" if bar.ours else "normal"
        for x, words, side in ((0, bar.label, "left"), (1, bar.text, "right")):
            text = axes.annotate(words, (x, place - 0.22), ha=side, **how)
            text.set_in_layout(False)  # it is inside the axes, and measuring it is slow
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(given) - 0.6, -0.95)

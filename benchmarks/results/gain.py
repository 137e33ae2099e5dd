"""README's figure: time and memory of the weighted loss with both gradients, for three heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.results.cells import find
from benchmarks.results.figures import STYLE, ours
from benchmarks.results.schema import RESULTS, Row, number, read

FOLDER = RESULTS / "epyc-zen5"
MODELS = {"smollm2-135m": "SmolLM2", "qwen2.5-0.5b": "Qwen2.5", "gemma3-270m": "Gemma-3"}
PROVIDERS = {
    "bft cpu sampled": "bft sampled",
    "bft cpu exact": "bft exact",
    "bft cpu exact, 256 MiB": "bft exact, 256 MiB",
    "compiled eager": "compiled eager",
    "cut-cross-entropy": "cut-cross-entropy",
    "liger chunked": "Liger, chunked",
    "torch chunked": "torch, chunked",
    "trl": "TRL, chunked",
}
_SHADES = {True: ("#0B4F7D", "#0072B2", "#56B4E9"), False: ("#555555", "#888888", "#BBBBBB")}


def draw() -> Figure:
    """Draws bars of each provider, one a model: time and memory; ValueError if a row is missing."""
    rows = read(FOLDER / "loss.csv")
    found = {
        (shape, provider): find(rows, provider=provider, shape=shape, weighting="bft", mode="both")
        for shape in MODELS
        for provider in PROVIDERS
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.5), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, found, "times_g", 1.0)
        left.axvline(1, color="#222222", linewidth=1, linestyle=":")
        left.set_xlabel("time, in bare GEMMs of hidden and weight (dotted)")
        _bars(right, found, "extra_bytes", 2.0**20)
        right.set_xscale("log")
        right.set_xlabel("peak memory beyond inputs and gradients, MiB")
        right.set_xlim(10, 5000)
        right.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
        left.invert_yaxis()
        heads = ", ".join(
            f"{name} ({int(found[model, 'trl']['vocabulary']):,})" for model, name in MODELS.items()
        )
        figure.suptitle(
            "Balanced loss and both gradients of 2048 tokens, float32, on 2 CPU cores\n"
            f"bars from the top: {heads}",
            fontsize=8,
        )
    return figure


def _bars(axes, found: Mapping[tuple[str, str], Row], column: str, unit: float) -> None:
    places = np.arange(len(PROVIDERS))
    for turn, model in enumerate(MODELS):
        values = [number(found[model, p], column) / unit for p in PROVIDERS]
        colours = [_SHADES[ours(p)][turn] for p in PROVIDERS]
        bars = axes.barh(places + 0.27 * (turn - 1), values, 0.25, color=colours)
        axes.bar_label(bars, [f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for v in values], fontsize=6)
    axes.set_yticks(places, PROVIDERS.values())

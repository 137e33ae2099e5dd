"""The rows of ``python -m benchmarks loss``: their columns, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = (
    "provider",
    "weighting",
    "mode",
    "shape",
    "inputs",
    "tokens",
    "width",
    "vocabulary",
    "dtype",
    "memory_kept",
    "commit",
    "processor",
    "device",
    "threads",
    "torch",
    "bft-kernels",
    "python",
    "packages",
    "load",
    "repeats",
    "seconds",
    "spread",
    "g_seconds",
    "times_g",
    "flops_per_second",
    "bytes_per_second",
    "extra_bytes",
    "error_hidden",
    "error_weight",
    "certificate_hidden",
    "certificate_weight",
    "options",
    "reason",
)
_MODES = {
    "forward": "forward, no gradients",
    "both": "forward, dH and dW",
    "frozen": "forward and dH, frozen head",
}
_SHOWN = ("seconds", "±", "x G", "Gflop/s", "GB/s", "MiB", "err dH", "err dW")


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """A table a weighting and mode, and below them who could not run and why."""
    bare, *others = rows
    for weighting, mode in dict.fromkeys((row["weighting"], row["mode"]) for row in others):
        measured = [
            row
            for row in others
            if (row["weighting"], row["mode"]) == (weighting, mode) and "seconds" in row
        ]
        console.print(_table(bare, measured, f"{weighting} loss, {_MODES[mode]}"))
    for providers, places, reason in _reasons(others):
        text = f"missing: {', '.join(providers)} ({', '.join(places)}): {reason}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _reasons(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], tuple[str, ...], str]]:
    """Providers that could not run in the same places for the same reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            where = f"{row['weighting']} {row['mode']}"
            places.setdefault((row["provider"], row["reason"]), []).append(where)
    together: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (provider, reason), found in places.items():
        together.setdefault((tuple(found), reason), []).append(provider)
    return [(providers, found, reason) for (found, reason), providers in together.items()]


def _table(bare: dict[str, Any], rows: Sequence[dict[str, Any]], what: str) -> Table:
    table = Table(
        title=f"{bare['shape']} ({bare['inputs']} inputs): N {bare['tokens']}, "
        f"D {bare['width']}, V {bare['vocabulary']}, {bare['dtype']}, {bare['device_kind']}"
        f"{', memory kept' if bare['memory_kept'] else ''}\n{what}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in _SHOWN:
        table.add_column(column, justify="right", no_wrap=True)
    for row in (bare, *rows):
        name = row["provider"]
        if row.get("options"):
            name += f" ({row['options']})"
        extra = row.get("extra_bytes", "")
        table.add_row(
            name,
            f"{row['seconds']:.3g}",
            f"{row['spread']:.0%}",
            f"{row['times_g']:.2f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            "" if extra == "" else f"{extra / 2**20:.0f}",
            *_errors(row, "error"),
        )
        if any(_errors(row, "certificate")):
            table.add_row("  certified", *[""] * 6, *_errors(row, "certificate"))
    return table


def _errors(row: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Of both gradients, relative to float64."""
    names = (f"{kind}_hidden", f"{kind}_weight")
    return tuple(f"{row[name]:.1e}" if name in row else "" for name in names)

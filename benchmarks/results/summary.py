"""Figures and summary of one run of ``python -m benchmarks gpu``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from benchmarks.measure.suite import read_outcome
from benchmarks.results.folder import Record

Row = dict[str, Any]


def by_shape(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each shape, under its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"N {row['tokens']}, D {row['width']}, V {row['vocabulary']}"
        found.setdefault(title, []).append(row)
    return found


def draw_figures(record: Record) -> None:
    """Writes ``loss``, as PNG and as SVG, where matplotlib is installed.

    Raises:
        RuntimeError: nothing was timed.
    """
    if find_spec("matplotlib") is None:
        record.say(
            "no figures: matplotlib is not installed; `python -m benchmarks plot` draws them"
        )
        return
    from benchmarks.results.figures import render, save
    from benchmarks.run.plot import loss_figures

    rows = [{name: str(value) for name, value in row.items()} for row in record.rows]
    figures = loss_figures(rows)
    if not figures:
        raise RuntimeError("figures: got no timed row, expected some")
    for name, panels in figures.items():
        for part in save(render(panels), record.folder / f".part-{name}"):
            os.replace(part, record.folder / f"{name}{part.suffix}")


def _bare(rows: list[Row]) -> float:
    """Seconds of 1G: the middle of what was measured beside each provider."""
    times = sorted(row["bare_seconds"] for row in rows)
    return float(times[len(times) // 2])


def write_summary(record: Record) -> None:
    """Writes summary.md from what there is by now."""
    facts = record.facts
    lines = [
        f"# {facts.get('device', record.device)}",
        "",
        f"Commit `{facts.get('commit', '')}`, torch {facts.get('torch', '')}, triton "
        f"{facts.get('triton', '')}, CUDA {facts.get('cuda', '') or 'none'}; see "
        "[environment.json](environment.json).",
        "",
        "## Tests",
        "",
    ]
    lines += [f"{read_outcome(record.tests).text}; see [tests.jsonl](tests.jsonl).", ""]
    for title, rows in by_shape(record.rows).items():
        lines += [f"## {title}", "", *_table(rows), ""]
    if (record.folder / "loss.png").exists():
        lines += ["![Time against memory](loss.png)", ""]
    lines += ["## Cut", "", *([f"- {title}" for title in record.cut] or ["Nothing."]), ""]
    lines += ["## Failures", ""]
    lines += [f"- {title}" for title in record.failed] or ["None."]
    if record.failed:
        lines += ["", "Details: [failures.txt](failures.txt)."]
    record.write("summary.md", "\n".join(lines) + "\n")


def _table(rows: list[Row]) -> list[str]:
    """Timed rows from fast to slow, then the others with their reasons."""
    timed = sorted((row for row in rows if row["seconds"] != ""), key=lambda row: row["seconds"])
    lines = []
    if rows[0]["scaled_down_from"]:
        lines += [f"Scaled down from {rows[0]['scaled_down_from']}: the device has no room.", ""]
    if timed:
        lines += [
            f"{rows[0]['dtype']}; 1G is {1e3 * _bare(timed):.2f} ms. Relative errors are against "
            "the torch backend's exact gradient.",
            "",
            "| | ms | x G | tokens/s | extra MiB | entries a token (listed) | error: loss | dH "
            "| dW | |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
    for row in timed:
        note = "" if row["status"] == "ok" else f"**{row['status']}**: "
        cells = [
            row["provider"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['times_g']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['extra_bytes'] / 2**20:.0f}" if row["extra_bytes"] != "" else "",
            _entries(row),
            _percent(row["error_loss"]),
            _percent(row["error_hidden"]),
            _percent(row["error_weight"]),
            note + str(row["reason"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    others = [row for row in rows if row["seconds"] == ""]
    if others and timed:
        lines.append("")
    return lines + [f"- {row['provider']}: {row['status']}: {row['reason']}" for row in others]


def _entries(row: Row) -> str:
    if row["entries_per_token"] == "":
        return ""
    listed = "" if row["listed_per_token"] == "" else f" ({row['listed_per_token']:.0f})"
    return f"{row['entries_per_token']:.0f}{listed}"


def _percent(value: float | str) -> str:
    return "" if isinstance(value, str) else f"{value:.2%}"

"""Writes figures and summary of one run of ``python -m benchmarks gpu``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import suite_plugin
from benchmarks.results.folder import Folder
from benchmarks.results.loss_table import FIGURES, label, markdown, reasons, sizes, timed
from benchmarks.results.schema import grouped

Row = dict[str, Any]
_SHOWN = [name for name in FIGURES if name not in ("Gflop/s", "GB/s")]


def draw_figures(folder: Folder) -> None:
    """Writes the figures of ``plot`` if matplotlib is installed; RuntimeError without a time."""
    if find_spec("matplotlib") is None:
        folder.say(
            "no figures: matplotlib is not installed; `python -m benchmarks plot` draws them"
        )
        return
    from benchmarks.results.figures import render, save
    from benchmarks.results.panels import loss_figures

    figures = loss_figures([{name: str(value) for name, value in r.items()} for r in folder.rows])
    if not figures:
        raise RuntimeError("figures: got no timed row, expected some")
    for name, panels in figures.items():
        part = save(render(panels), folder.path / f".part-{name}")
        part.replace(folder.path / f"{name}{part.suffix}")


def write_summary(folder: Folder) -> None:
    """Writes summary.md from the results so far."""
    facts = defaultdict(str, folder.facts)
    blocks = [
        f"# {facts['device'] or folder.device}",
        f"Commit `{facts['commit']}`, torch {facts['torch']}, triton {facts['triton']}, CUDA "
        f"{facts['cuda'] or 'none'}; see [environment.json](environment.json).",
        "## Tests",
        f"{suite_plugin.told(suite_plugin.read(folder.tests))}; see [tests.jsonl](tests.jsonl).",
    ]
    shapes: dict[str, list[Row]] = defaultdict(list)
    for row in folder.rows:
        shapes[f"{row['shape']}, {sizes(row)}".removeprefix(", ")].append(row)
    for title, rows in shapes.items():
        blocks += [f"## {title}", *_tables(rows)]
    blocks += [f"![Time and memory]({path.name})" for path in sorted(folder.path.glob("*.png"))]
    for title, found in {"Cut": folder.cut, "Failures": folder.failed}.items():
        blocks += [f"## {title}", "\n".join(f"- {one}" for one in found) or "None."]
    if folder.failed:
        blocks.append("Details: [failures.txt](failures.txt).")
    folder.write("summary.md", "\n\n".join(blocks) + "\n")


def _tables(rows: list[Row]) -> list[str]:
    """Tables of the timed rows, the fastest first, then the other rows with their reasons."""
    blocks, ranked = [], sorted(timed(rows), key=lambda row: row["seconds"])
    if rows[0]["scaled_down_from"]:
        blocks.append(f"Scaled down from {rows[0]['scaled_down_from']}: the device has no room.")
    if ranked:
        bare = 1e3 * statistics.median(row["g_seconds"] for row in ranked)
        against = "Relative errors are against the torch backend's exact gradient."
        cells = [["", "loss", *_SHOWN, "note"]]
        for row in ranked:
            note = "" if row["status"] == "ok" else f"**{row['status']}**: "
            figures = [FIGURES[name](row) for name in _SHOWN]
            kind = f"{row['weighting']}, {row['mode']}"
            cells.append([label(row), kind, *figures, f"{note}{row['reason']}"])
        blocks += [f"1G is {bare:.2f} ms. {against}", markdown(cells)]
    others = [row for row in rows if row["seconds"] == ""]
    missing = [
        f"- {status}: {text}"
        for (status,), same in grouped(others, "status").items()
        for text in reasons(same)
    ]
    return [*blocks, "\n".join(missing)] if missing else blocks

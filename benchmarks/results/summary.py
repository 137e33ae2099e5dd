"""Figures and summary of one run of ``python -m benchmarks gpu``."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import suite_plugin
from benchmarks.results.folder import Folder
from benchmarks.results.loss_table import FIGURES, label, markdown, reasons, sizes, timed

Row = dict[str, Any]
_SHOWN = [name for name in FIGURES if name not in ("Gflop/s", "GB/s")]


def draw_figures(folder: Folder) -> None:
    """Writes those of ``python -m benchmarks plot``, where matplotlib is installed.

    Raises:
        RuntimeError: nothing was timed.
    """
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
    """Writes summary.md from what there is by now."""
    facts = folder.facts
    lines = [
        f"# {facts.get('device', folder.device)}",
        "",
        f"Commit `{facts.get('commit', '')}`, torch {facts.get('torch', '')}, triton "
        f"{facts.get('triton', '')}, CUDA {facts.get('cuda', '') or 'none'}; see "
        "[environment.json](environment.json).",
        "",
        "## Tests",
        "",
        f"{suite_plugin.told(suite_plugin.read(folder.tests))}; see [tests.jsonl](tests.jsonl).",
        "",
    ]
    shapes: dict[str, list[Row]] = {}
    for row in folder.rows:
        name = f"{row['shape']}, " if row["shape"] else ""
        shapes.setdefault(f"{name}{sizes(row)}", []).append(row)
    for title, rows in shapes.items():
        lines += [f"## {title}", "", *_table(rows), ""]
    lines += [f"![Time and memory]({path.name})" for path in sorted(folder.path.glob("*.png"))]
    for title, found in {"Cut": folder.cut, "Failures": folder.failed}.items():
        lines += ["", f"## {title}", "", *([f"- {one}" for one in found] or ["None."])]
    if folder.failed:
        lines += ["", "Details: [failures.txt](failures.txt)."]
    folder.write("summary.md", "\n".join(lines) + "\n")


def _table(rows: list[Row]) -> list[str]:
    """Timed rows from fast to slow, then the others with their reasons."""
    lines, ranked = [], sorted(timed(rows), key=lambda row: row["seconds"])
    if rows[0]["scaled_down_from"]:
        lines += [f"Scaled down from {rows[0]['scaled_down_from']}: the device has no room.", ""]
    if ranked:
        bare = statistics.median(row["g_seconds"] for row in ranked)
        lines += [
            f"1G is {1e3 * bare:.2f} ms. Relative errors are against the torch backend's exact "
            "gradient.",
            "",
        ]
        cells = [["", "loss", *_SHOWN, "note"]]
        for row in ranked:
            note = "" if row["status"] == "ok" else f"**{row['status']}**: "
            figures = [FIGURES[name](row) for name in _SHOWN]
            kind = f"{row['weighting']}, {row['mode']}"
            cells.append([label(row), kind, *figures, f"{note}{row['reason']}"])
        lines += [*markdown(cells).splitlines(), ""]
    others = [row for row in rows if row["seconds"] == ""]
    for status in dict.fromkeys(row["status"] for row in others):
        same = [row for row in others if row["status"] == status]
        lines += [f"- {status}: {text}" for text in reasons(same)]
    return lines

"""Figures and summary of one run of ``python -m benchmarks gpu``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.gpu_providers import CANDIDATES
from benchmarks.gpu_record import Record
from benchmarks.gpu_suite import read_junit

Row = dict[str, Any]
_MARKERS = "osD^v<>Ph*X8dp"


def by_shape(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each shape, under its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"N {row['tokens']}, D {row['width']}, V {row['vocabulary']}"
        found.setdefault(title, []).append(row)
    return found


def colour(row: Row) -> str:
    """One for each backend of ours, one for all peers."""
    return {"bft triton": "C3", "bft cuda": "C2", "bft torch": "C1"}.get(row["family"], "C0")


def draw_figures(record: Record) -> None:
    """Writes ``memory`` and ``times``, as PNG and as SVG.

    Raises:
        RuntimeError: nothing was timed.
    """
    timed = by_shape(row for row in record.rows if row["seconds"] != "")
    if not timed:
        raise RuntimeError("figures: got no timed row, expected some")
    for name, draw in (("memory", _against_memory), ("times", _bars)):
        columns = min(2, len(timed))
        lines = math.ceil(len(timed) / columns)
        height = 5.0 if name == "memory" else 1.2 + 0.22 * max(map(len, timed.values()))
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(7 * columns, height * lines),
            layout="constrained",
            squeeze=False,
        )
        for panel in axes.flat[len(timed) :]:
            panel.remove()
        for panel, (title, rows) in zip(axes.flat, timed.items(), strict=False):
            draw(panel, rows)
            panel.set_title(f"{title}, {rows[0]['dtype']}", fontsize=10)
        figure.suptitle(str(record.facts.get("device", "")), fontsize=11)
        for suffix in ("png", "svg"):
            figure.savefig(record.folder / f"{name}.{suffix}", dpi=120)
        plt.close(figure)


def _against_memory(axes: Any, rows: list[Row]) -> None:
    bare = _bare(rows)
    names = list(dict.fromkeys([*(c.name for c in CANDIDATES), *(row["provider"] for row in rows)]))
    for row in rows:
        if row["extra_bytes"] == "":
            continue
        axes.plot(
            max(1.0, row["extra_bytes"] / 2**20),
            1e3 * row["seconds"],
            _MARKERS[names.index(row["provider"]) % len(_MARKERS)],
            color=colour(row),
            fillstyle="none" if "frozen" in row["provider"] else "full",
            label=row["provider"],
        )
    axes.axhline(1e3 * bare, color="grey", linestyle=":", label="bare GEMM, 1G")
    axes.set_xscale("log")
    axes.set_xlabel("peak memory beyond inputs and gradients (MiB)")
    axes.set_ylabel("forward and gradients (ms)")
    times = [bare, *(row["seconds"] for row in rows)]
    if _wide(times):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bars(axes: Any, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row["times_g"], reverse=True)
    values = [row["times_g"] for row in rows]
    bars = axes.barh([row["provider"] for row in rows], values, color=[colour(row) for row in rows])
    axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=2)
    axes.axvline(1.0, color="grey", linestyle=":", label="bare GEMM, 1G")
    axes.tick_params(axis="y", labelsize=7)
    if _wide(values):
        axes.set_xscale("log")
    axes.set_xlabel("x G")
    axes.margins(x=0.1)
    axes.legend(fontsize=7, loc="upper right")


def _wide(values: list[float]) -> bool:
    """Whether a linear axis would squash the small ones."""
    return max(values) > 20 * min(values)


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
    report = record.folder / "junit.xml"
    lines += [read_junit(report).text + "." if report.exists() else "No report.", ""]
    for title, rows in by_shape(record.rows).items():
        lines += [f"## {title}", "", *_table(rows), ""]
    for name in ("memory", "times"):
        if (record.folder / f"{name}.png").exists():
            lines += [f"![{name}]({name}.png)", ""]
    lines += ["## Failures", ""]
    lines += [f"- {title}" for title in record.failed] or ["None."]
    if record.failed:
        lines += ["", "Details: [failures.txt](failures.txt)."]
    (record.folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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

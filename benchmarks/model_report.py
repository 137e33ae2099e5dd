"""The predictions as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks.model_entries import DENSE, DENSER, Kept
from benchmarks.model_hardware import (
    BANDWIDTH_FRACTION,
    EMPTY_PROGRAM,
    LATENCY,
    LAUNCH,
    VENDOR_FRACTION,
    Gpu,
)
from benchmarks.model_peers import errors
from bft_kernels.backends.gpu.lists import capacity_for

Rows = Sequence[dict[str, Any]]


def tables(rows: Rows, gpus: Sequence[Gpu], known: Sequence[Kept]) -> Iterator[Table | str]:
    """Everything, in the order in which it should be read."""
    yield ceilings(gpus)
    yield published(of(rows, "published"))
    yield error_line()
    yield goals(of(rows, "goal"))
    yield others(of(rows, "other"))
    for name in dict.fromkeys(row["kind"] for row in rows if row["kind"].startswith("kernel")):
        yield breakdown(name, of(rows, name))
    yield designs(of(rows, "design"))
    yield engines(of(rows, "engine"))
    yield entries(known)


def of(rows: Rows, kind: str) -> Rows:
    """Rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def table(title: str, columns: Iterable[str], caption: str = "") -> Table:
    """Empty; the first column left, figures right."""
    made = Table(title=title, caption=caption or None, caption_justify="left")
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left", no_wrap=not i)
    return made


def ceilings(gpus: Sequence[Gpu]) -> Table:
    """What no prediction may exceed, and where it is from."""
    caption = "\n".join(
        [
            *(
                f"{gpu.name}: {gpu.sources['ceilings']}; rate {gpu.sources['vendor']}"
                for gpu in gpus
            ),
            f"vendor: {VENDOR_FRACTION:.1%} of peak; Triton: its loop's rate, of the vendor's",
            f"all: {BANDWIDTH_FRACTION:.0%} of the memory's bandwidth, {LAUNCH * 1e6:.0f} us a "
            f"launch, {LATENCY * 1e6:.1f} us a load, {EMPTY_PROGRAM * 1e6:.0f} us a program "
            "without work; L2 bandwidth assumed",
        ]
    )
    lines = [gpu.row() for gpu in gpus]
    made = table("Ceilings", lines[0], caption)
    for line in lines:
        made.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in line.values()))
    return made


def published(rows: Rows) -> Table:
    """Predicted against published."""
    made = table(
        "Published, forward + backward, bfloat16",
        ("", "GPU", "N", "D", "V", "published ms", "predicted ms", "error"),
    )
    for row in rows:
        made.add_row(
            row["name"],
            row["gpu"],
            *(str(row[key]) for key in ("tokens", "width", "vocabulary")),
            f"{row['published_seconds'] * 1e3:.2f}",
            f"{row['seconds'] * 1e3:.2f}",
            "calibrates" if row["calibrates"] else f"{row['error']:+.0%}",
        )
    return made


def error_line() -> str:
    """The model's error, by kind of figure."""
    parts = []
    for narrow, name in ((False, "wide chunks or none"), (True, "chunks of 256 rows and less")):
        found = errors(narrow=narrow)
        middle = statistics.median(map(abs, found))
        parts.append(f"{name}: {found[0]:+.0%} to {found[-1]:+.0%}, median {middle:.0%}")
    return "error of the model, " + "; ".join(parts)


def goals(rows: Rows) -> Table:
    """Ours, as built; the verdict is that of the costliest text."""
    made = table(
        "Ours as built: predicted, not measured",
        ("", "GPU", "ms", "with the model's error", "x G", "goal", "", "untested"),
        "untested: share of kernels whose like no published figure has",
    )
    for name, gpu in dict.fromkeys((row["name"], row["gpu"]) for row in rows):
        alike = [row for row in rows if (row["name"], row["gpu"]) == (name, gpu)]
        worst = max(alike, key=lambda row: float(row["seconds"]))
        made.add_row(
            name,
            gpu,
            span([row["seconds"] * 1e3 for row in alike], 1),
            f"{worst['low_seconds'] * 1e3:.1f} to {worst['high_seconds'] * 1e3:.1f}",
            span([row["times_g"] for row in alike], 2),
            f"{worst['limit']:.2f}",
            "met" if worst["met"] else "missed",
            f"{worst['untested']:.0%}",
        )
    return made


def span(values: Sequence[float], digits: int) -> str:
    """Least and largest, or the one."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def others(rows: Rows) -> Table:
    """Other calls, and what the exact loss takes beyond the float32 accumulator of dW."""
    made = table("Other calls", ("", "GPU", "ms", "x G", "extra GiB"))
    for row in rows:
        extra = f"{row['extra_bytes'] / 2**30:.1f}" if row["extra_bytes"] != "" else ""
        figures = f"{row['seconds'] * 1e3:.1f}", f"{row['times_g']:.2f}", extra
        made.add_row(row["name"], row["gpu"], *figures)
    return made


def breakdown(title: str, rows: Rows) -> Table:
    """Where the time goes: all that takes a hundredth of G."""
    model = rows[0]["model"] if rows[0]["eps"] and "sampled" in title else ""
    made = table(" ".join([title, rows[0]["gpu"], model]).strip(), ("kernel", "ms", "x G"))
    for row in rows:
        if row["times_g"] >= 0.01:
            made.add_row(row["name"], f"{row['seconds'] * 1e3:.2f}", f"{row['times_g']:.3f}")
    return made


def designs(rows: Rows) -> Table:
    """Sampled forward, dH and dW in x G, as built and otherwise."""
    steps = list(dict.fromkeys(row["eps"] for row in rows))
    made = table(
        "Sampled, x G, as built and as it could be",
        ("", "GPU", *(f"eps 2^-{round(1 / eps).bit_length() - 1}" for eps in steps)),
    )
    for gpu, name in dict.fromkeys((row["gpu"], row["name"]) for row in rows):
        alike = [row for row in rows if (row["gpu"], row["name"]) == (gpu, name)]
        found = ([row["times_g"] for row in alike if row["eps"] == eps] for eps in steps)
        made.add_row(name, gpu, *(span(values, 2) for values in found))
    return made


def engines(rows: Rows) -> Table:
    """Losses alone, in x G: logits in registers, or from the vendor's product."""
    widths = list(dict.fromkeys(row["width"] for row in rows))
    made = table("Forward only, x G, by engine", ("", "GPU", *(f"D {width}" for width in widths)))
    for gpu, name in dict.fromkeys((row["gpu"], row["name"]) for row in rows):
        alike = [row for row in rows if (row["gpu"], row["name"]) == (gpu, name)]
        made.add_row(name, gpu, *(f"{row['times_g']:.2f}" for row in alike))
    return made


def entries(known: Sequence[Kept]) -> Table:
    """What is kept of real text: measured, on a CPU."""
    made = table(
        "Entries of real text, a token: measured",
        (
            "",
            "V",
            "eps",
            "kept",
            "let through: chunks",
            "tiled",
            "tiled, target only",
            "room",
            "columns",
            *(f"in the {few} commonest" for few in (DENSE, DENSER)),
            "L2 hits, kept",
            "listed",
        ),
        "hits: of rows of weight, 8 KiB each, in the 50 MB of an H100",
    )
    for kept in known:
        made.add_row(
            kept.model,
            str(kept.vocabulary),
            f"2^-{round(1 / kept.eps).bit_length() - 1}",
            f"{kept.entries:.0f}",
            *(f"{x:.0f}" for x in (kept.candidates, kept.listed_popular, kept.listed)),
            f"{capacity_for(1, kept.vocabulary, kept.eps)}",
            f"{kept.distinct}",
            *(f"{kept.common[few]:.0%}" for few in (DENSE, DENSER)),
            *(f"{kept.hits_at(50e6 / 8192, listed=listed):.0%}" for listed in (False, True)),
        )
    return made

"""Writes, reads and checks the CSVs of ``benchmarks/results``: one row a measurement."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
# The columns of loss.csv; benchmarks/README.md says what they are.
# fmt: off
COLUMNS = (
    "provider", "weighting", "mode", "status",
    "shape", "inputs", "tokens", "width", "vocabulary", "scaled_down_from", "dtype", "memory_kept",
    "commit", "processor", "device", "threads", "torch", "triton", "cuda", "bft-kernels", "python",
    "packages", "load", "repeats",
    "seconds", "fastest_seconds", "slowest_seconds", "spread", "first_seconds",
    "g_seconds", "times_g", "tokens_per_second", "flops_per_second", "bytes_per_second",
    "extra_bytes", "eps", "entries_per_token", "listed_per_token",
    "error_loss", "error_hidden", "error_weight", "certificate_hidden", "certificate_weight",
    "options", "reason",
)
# fmt: on
# The parts of a fine-tuning step, in order; `train` writes their seconds. The head is the product,
# the loss, and their gradients.
PARTS = ("layers_forward", "head_forward", "head_backward", "layers_backward", "optimizer")
# The columns of train.csv that are filled in after a measurement.
# fmt: off
STEP_COLUMNS = (
    "batch", "seconds", "spread", *(f"{part}_seconds" for part in PARTS), "tokens_per_second",
    "peak_bytes", "limit_bytes", "largest_batch", "note", "reason",
)
# fmt: on
# In the order in which they are shown; the balanced loss is the purpose of the package.
WEIGHTINGS = {"bft": "weighted by BFT", "dft": "weighted by DFT", "plain": "not weighted"}

Row = Mapping[str, str]


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """ValueError if a file has other columns, because rows of two kinds could not be read."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != list(columns):
        raise ValueError(
            f"output: got {path}, whose columns are {','.join(found)}, expected a new file or one "
            f"with the columns {','.join(columns)}"
        )


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file, and its header if it is new; ValueError if its columns differ."""
    check_columns(path, list(rows[0]))
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def full(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of loss.csv with all columns in order, empty if not given; ValueError for others."""
    unknown = row.keys() - set(COLUMNS)
    if unknown:
        raise ValueError(f"loss.csv has no column {', '.join(sorted(unknown))}")
    return dict.fromkeys(COLUMNS, "") | row


def read(path: Path) -> list[Row]:
    """All rows of a CSV; none if there is no such file; ValueError if fields are missing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                raise ValueError(f"{path}, line {reader.line_num}: expected {fields} fields")
            rows.append(row)
    return rows


def number(row: Row, column: str) -> float | None:
    """A finite figure; None if there is none or no such column; ValueError for a word."""
    text = row.get(column, "")
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{column}: got {text!r}, expected a number or nothing") from None
    return value if math.isfinite(value) else None


def key(row: Row, columns: Iterable[str]) -> tuple[str, ...]:
    """The values of a row in these columns; a column that an older file lacks is empty."""
    return tuple(row.get(column, "") for column in columns)


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their values in these columns, in the order of each value's first row."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row, columns), []).append(row)
    return groups


def latest(rows: Iterable[Row], *columns: str) -> list[Row]:
    """The last written of rows that agree in these columns: a later run replaces an earlier one."""
    return list({key(row, columns): row for row in rows}.values())


def digits(value: float) -> str:
    """Three significant digits without an exponent; all of a whole number."""
    if not value or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"

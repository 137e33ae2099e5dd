"""Shows rows of loss.csv: cells of a table, and the providers that could not run and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results.schema import grouped

Row = Mapping[str, Any]


def figure(column: str, form: str, unit: float = 1.0) -> Callable[[Row], str]:
    """A function that writes a column's value in units of ``unit``; empty if there is none."""

    def text(row: Row) -> str:
        value = row.get(column, "")
        return "" if value == "" else f"{value / unit:{form}}"

    return text


def _entries(row: Row) -> str:
    """The expected entries, and those that the forward lists."""
    kept, listed = (figure(f"{name}_per_token", ".0f")(row) for name in ("entries", "listed"))
    return f"{kept} ({listed})" if listed else kept


# The function for each heading.
FIGURES: dict[str, Callable[[Row], str]] = {
    "ms": figure("seconds", ",.2f", 1e-3),
    "±": figure("spread", ".0%"),
    "x G": figure("times_g", ".2f"),
    "tokens/s": figure("tokens_per_second", ".0f"),
    "Gflop/s": figure("flops_per_second", ".0f", 1e9),
    "GB/s": figure("bytes_per_second", ".2f", 1e9),
    "MiB": figure("extra_bytes", ".0f", 2**20),
    "entries a token (listed)": _entries,
    "err loss": figure("error_loss", ".1e"),
    "err dH": figure("error_hidden", ".1e"),
    "err dW": figure("error_weight", ".1e"),
}


def label(row: Row) -> str:
    """The provider, with its fastest option."""
    return f"{row['provider']} ({row['options']})" if row.get("options") else row["provider"]


def sizes(row: Row) -> str:
    """The sizes of a row's problem."""
    return f"N {row['tokens']}, D {row['width']}, V {row['vocabulary']}, {row['dtype']}"


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in rows if row.get("seconds", "") != ""]


def reasons(rows: Iterable[Row]) -> list[str]:
    """Providers without figures and why, in one line if the reason is the same."""
    together: dict[tuple[str, str], list[str]] = {}
    for (provider, reason), same in grouped(rows, "provider", "reason").items():
        where = ", ".join(f"{row['weighting']} {row['mode']}" for row in same)
        if reason:
            together.setdefault((where, reason), []).append(provider)
    return [f"{', '.join(who)} ({where}): {reason}" for (where, reason), who in together.items()]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table: figures on the right; a first column without heading has labels on the left."""
    heading, *lines = (
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in cells
    )
    rule = ("|---:|" if cells[0][0] else "|---|") + "---:|" * (len(cells[0]) - 1)
    return "\n".join([heading, rule, *lines])


def show(title: str, cells: Sequence[Sequence[str]], left: int = 0) -> None:
    """Prints a table, right-aligned except the first columns and those without a heading."""
    from rich import box, table
    from rich.console import Console

    made = table.Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for place, column in enumerate(cells[0]):
        text = place < left or not column
        made.add_column(column, justify="left" if text else "right", no_wrap=bool(column))
    for line in cells[1:]:
        made.add_row(*line)
    # Without the 80 columns that rich assumes for a file.
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(made)

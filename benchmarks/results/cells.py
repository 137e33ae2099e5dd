"""Makes the cells of the tables in docs/ from the CSVs; the heading comes first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results.schema import RESULTS, WEIGHTINGS, Row, digits, grouped, key, number, read

Cells = list[list[str]]


@dataclass(frozen=True)
class Line:
    """A line of a table of losses: its label, and the rows that it shows."""

    label: str
    provider: str
    weighting: str = "bft"
    mode: str = "both"
    bold: bool = False

    def of(self, rows: Iterable[Row], shape: str) -> Row:
        """The row that it shows for one shape."""
        what = {"provider": self.provider, "weighting": self.weighting, "mode": self.mode}
        return find(rows, **what, shape=shape)


def losses(folder: str, tokens: int, models: Mapping[str, str], lines: Sequence[Line]) -> Cells:
    """Times in multiples of 1G and MiB of extra memory, from a folder of benchmarks/results.

    Each model has a column; ``models`` has its name by its shape.
    """
    rows = measured(folder, "loss.csv", tokens)
    heading, product = [""], ["1G, seconds"]
    for shape, name in models.items():
        # 1G is that of the first line's run; other modes may have been run separately.
        first = lines[0].of(rows, shape)
        heading += [f"{name}, `V` {int(first['vocabulary']):,}", "MiB"]
        product += [f"{number(first, 'g_seconds'):.3f}", ""]
    cells = [heading, product]
    for line in lines:
        found = [time_and_memory(line.of(rows, shape)) for shape in models]
        texts = [line.label, *(text for pair in found for text in pair)]
        cells.append([f"**{text}**" if line.bold and text else text for text in texts])
    return cells


def repeated(
    folder: str, tokens: int, models: Mapping[str, str], lines: Sequence[Line], second: str
) -> Cells:
    """Multiples of 1G in two runs, and the ratio of that in file ``second`` to the other."""
    cells = [["", *(title for name in models.values() for title in (name, "again", "ratio"))]]
    runs = [measured(folder, file, tokens) for file in ("loss.csv", second)]
    for line in lines:
        texts = [line.label]
        for shape in models:
            once, again = (number(line.of(rows, shape), "times_g") or math.nan for rows in runs)
            texts += [f"{once:.2f}", f"{again:.2f}", f"{again / once:.2f}"]
        cells.append(texts)
    return cells


def all_modes(folder: str, tokens: int, shape: str) -> Cells:
    """All providers on one model: times in multiples of 1G and MiB, with a column for each mode.

    The CSV has the reason of a provider that could not run.
    """
    rows = where(measured(folder, "loss.csv", tokens), shape=shape, weighting="bft")
    modes = ("both", "frozen", "forward")
    cells = [["", *(name for mode in modes for name in (mode, "MiB"))]]
    for (provider,) in grouped([row for row in rows if row["seconds"]], "provider"):
        found = [time_and_memory(find(rows, provider=provider, mode=mode)) for mode in modes]
        cells.append([provider, *(text for pair in found for text in pair)])
    return cells


def steps(folder: str, model: str) -> Cells:
    """Steps of full fine-tuning: time, peak memory, and the largest batch under each limit."""
    # A row with a reason is of a loss that could not run.
    what = {"model": model, "mode": "full", "gradient_checkpointing": "False", "reason": ""}
    rows = where(read(RESULTS / folder / "train.csv"), **what)
    timed = [row for row in rows if not row["limit_bytes"]]
    limits = sorted({int(row["limit_bytes"]) for row in rows if row["limit_bytes"]})
    batches = " or ".join(dict.fromkeys(row["batch"] for row in timed))
    heading = ["", f"step of {batches}, s", "of it the head", "peak GiB"]
    cells = [heading + [f"fit in {limit / 2**30:g} GiB" for limit in limits]]
    for weighting, loss in grouped(rows, "weighting", "loss"):
        step = find(timed, weighting=weighting, loss=loss)
        taken, peak = number(step, "seconds"), number(step, "peak_bytes")
        head = sum(number(step, f"head_{way}_seconds") or 0 for way in ("forward", "backward"))
        texts = [
            f"{loss}, {WEIGHTINGS[weighting]}",
            "" if taken is None else digits(taken),
            digits(head) if head else "",
            "" if peak is None else f"{peak / 2**30:.2f}",
        ]
        for limit in limits:
            row = find(rows, weighting=weighting, loss=loss, limit_bytes=str(limit))
            at_least = "at least " if row["note"].startswith("at least") else ""
            texts.append(f"{at_least}{row['largest_batch']}")
        cells.append(texts)
    return cells


def growth(folder: str, provider: str) -> Cells:
    """Seconds and multiples of the bare GEMM, by tokens and vocabularies."""
    what = {"provider": provider, "weighting": "bft", "mode": "both"}
    rows = where(read(RESULTS / folder / "scale.csv"), **what)
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in rows))
    cells = [["N", *(f"V {int(vocabulary):,}" for vocabulary in vocabularies)]]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        line = [tokens]
        for vocabulary in vocabularies:
            row = find(rows, tokens=tokens, vocabulary=vocabulary)
            taken = number(row, "seconds")
            line.append(f"{digits(taken)}, {taken / number(row, 'bare_product_seconds'):.2f}")
        cells.append(line)
    return cells


def measured(folder: str, file: str, tokens: int) -> list[Row]:
    """The rows in float32 of real inputs with memory kept."""
    how = {"dtype": "float32", "inputs": "recorded", "memory_kept": "True"}
    return where(read(RESULTS / folder / file), tokens=str(tokens), **how)


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows with these values, or ValueError; a column that an older file lacks is empty."""
    found = [row for row in rows if key(row, wanted) == tuple(wanted.values())]
    if not found:
        told = ", ".join(f"{column} {value!r}" for column, value in wanted.items() if value)
        raise ValueError(f"found no row with {told}")
    return found


def find(rows: Iterable[Row], **wanted: str) -> Row:
    """The last written row with these values: a later run replaces an earlier one."""
    return where(rows, **wanted)[-1]


def time_and_memory(row: Row) -> tuple[str, str]:
    """Multiples of 1G and MiB, each empty where the row has none."""
    times_g, extra = number(row, "times_g"), number(row, "extra_bytes")
    return (
        "" if times_g is None else f"{times_g:.2f}",
        "" if extra is None else f"{extra / 2**20:.0f}",
    )

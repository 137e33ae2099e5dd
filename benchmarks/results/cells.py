"""Cells of the tables of docs/, from the CSVs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.results.schema import (
    RESULTS,
    WEIGHTINGS,
    Row,
    digits,
    grouped,
    key,
    number,
    read,
    values,
)


@dataclass(frozen=True)
class Line:
    """A line of a table of losses: what it is called, and the row of each shape that it shows."""

    label: str
    provider: str
    weighting: str = "bft"
    mode: str = "both"
    bold: bool = False


@dataclass(frozen=True)
class Losses:
    """Times in multiples of 1G and MiB of extra memory: lines by models."""

    folder: str  # below benchmarks/results
    tokens: int
    models: dict[str, str]  # a shape of the CSV, and what the model is called
    lines: tuple[Line, ...]

    def __call__(self) -> list[list[str]]:
        """Cells, the heading first."""
        rows = self.rows("loss.csv")
        heading, product = [""], ["1G, seconds"]
        for shape, name in self.models.items():
            # Of the run that the first line is of; other modes may have been run apart.
            first = find_line(rows, self.lines[0], shape)
            heading += [f"{name}, `V` {int(first['vocabulary']):,}", "MiB"]
            product += [f"{number(first, 'g_seconds') or 0.0:.3f}", ""]
        cells = [heading, product]
        for line in self.lines:
            texts = [line.label]
            for shape in self.models:
                texts += time_and_memory(find_line(rows, line, shape))
            cells.append([f"**{text}**" if line.bold and text else text for text in texts])
        return cells

    def rows(self, file: str) -> list[Row]:
        """Of a file of the folder, those measured as the table says."""
        how = {"dtype": "float32", "inputs": "recorded", "memory_kept": "True"}
        return where(read(RESULTS / self.folder / file), tokens=str(self.tokens), **how)


@dataclass(frozen=True)
class Repeated:
    """Multiples of 1G in two runs, and the second over the first."""

    first: Losses
    second: str  # file in the folder of ``first``

    def __call__(self) -> list[list[str]]:
        """Cells, the heading first."""
        heading = [""]
        for name in self.first.models.values():
            heading += [name, "again", "ratio"]
        cells = [heading]
        for line, pairs in zip(self.first.lines, self.pairs(), strict=True):
            texts = [line.label]
            for once, again in pairs:
                texts += [f"{once:.2f}", f"{again:.2f}", f"{again / once:.2f}"]
            cells.append(texts)
        return cells

    def pairs(self) -> list[list[tuple[float, float]]]:
        """Of each line and model the two multiples of 1G."""
        once, again = (self.first.rows(file) for file in ("loss.csv", self.second))

        def times_g(rows: list[Row], line: Line, shape: str) -> float:
            return number(find_line(rows, line, shape), "times_g") or math.nan

        return [
            [(times_g(once, line, one), times_g(again, line, one)) for one in self.first.models]
            for line in self.first.lines
        ]


@dataclass(frozen=True)
class Modes:
    """All providers on one model: times in multiples of 1G and MiB, a mode beside the other."""

    losses: Losses
    shape: str
    weighting: str = "bft"

    def __call__(self) -> list[list[str]]:
        """Cells, the heading first; a provider that could not run has its reason in the CSV."""
        rows = where(self.losses.rows("loss.csv"), shape=self.shape, weighting=self.weighting)
        modes = ("both", "frozen", "forward")
        cells = [["", *(name for mode in modes for name in (mode, "MiB"))]]
        for (provider,) in grouped([row for row in rows if row["seconds"]], "provider"):
            texts = [provider]
            for mode in modes:
                texts += time_and_memory(find(rows, provider=provider, mode=mode))
            cells.append(texts)
        return cells


@dataclass(frozen=True)
class Steps:
    """Steps of full fine-tuning: time, peak memory, and the largest batch under each limit."""

    folder: str  # below benchmarks/results
    model: str

    def __call__(self) -> list[list[str]]:
        """Cells, the heading first; a line for each weighting and loss."""
        rows = where(
            read(RESULTS / self.folder / "train.csv"),
            model=self.model,
            mode="full",
            gradient_checkpointing="False",
            reason="",  # of those that cannot run, the file has it
        )
        steps = [row for row in rows if not row["limit_bytes"]]
        limits = sorted({int(row["limit_bytes"]) for row in rows if row["limit_bytes"]})
        batches = values(steps, "batch")
        heading = ["", f"step of {' or '.join(batches)}, s", "of it the head", "peak GiB"]
        cells = [heading + [f"fit in {limit / 2**30:g} GiB" for limit in limits]]
        for weighting, loss in grouped(rows, "weighting", "loss"):
            texts = [f"{loss}, {WEIGHTINGS[weighting]}"]
            step = find(steps, weighting=weighting, loss=loss)
            taken, peak = number(step, "seconds"), number(step, "peak_bytes")
            head = [number(step, f"head_{way}_seconds") or 0.0 for way in ("forward", "backward")]
            texts.append("" if taken is None else digits(taken))
            texts.append(digits(sum(head)) if any(head) else "")
            texts.append("" if peak is None else f"{peak / 2**30:.2f}")
            for limit in limits:
                row = find(rows, weighting=weighting, loss=loss, limit_bytes=str(limit))
                at_least = "at least " if row["note"].startswith("at least") else ""
                texts.append(f"{at_least}{row['largest_batch']}")
            cells.append(texts)
        return cells


@dataclass(frozen=True)
class Growth:
    """Seconds and multiples of the bare product: tokens by vocabularies."""

    folder: str  # below benchmarks/results
    provider: str

    def __call__(self) -> list[list[str]]:
        """Cells, the heading first."""
        what = {"provider": self.provider, "weighting": "bft", "mode": "both"}
        rows = where(read(RESULTS / self.folder / "scale.csv"), **what)
        vocabularies = list(grouped(rows, "vocabulary"))
        cells = [["N", *(f"V {int(vocabulary):,}" for (vocabulary,) in vocabularies)]]
        for (tokens,) in grouped(rows, "tokens"):
            line = [tokens]
            for (vocabulary,) in vocabularies:
                row = find(rows, tokens=tokens, vocabulary=vocabulary)
                taken = number(row, "seconds") or 0.0
                product = number(row, "bare_product_seconds") or 0.0
                line.append(f"{digits(taken)}, {taken / product:.2f}")
            cells.append(line)
        return cells


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows that say this; a column that an older file lacks is empty.

    Raises:
        ValueError: there is none.
    """
    found = [row for row in rows if key(row, wanted) == tuple(wanted.values())]
    if not found:
        told = ", ".join(f"{column} {value!r}" for column, value in wanted.items() if value)
        raise ValueError(f"found no row with {told}")
    return found


def find(rows: Iterable[Row], **wanted: str) -> Row:
    """The last written row that says this: a later run replaces an earlier one."""
    return where(rows, **wanted)[-1]


def find_line(rows: Iterable[Row], line: Line, shape: str) -> Row:
    """The row of a line and a model."""
    what = {"provider": line.provider, "weighting": line.weighting, "mode": line.mode}
    return find(rows, **what, shape=shape)


def time_and_memory(row: Row) -> list[str]:
    """Multiples of 1G and MiB, each empty where the row has none."""
    times_g, extra = number(row, "times_g"), number(row, "extra_bytes")
    return [
        "" if times_g is None else f"{times_g:.2f}",
        "" if extra is None else f"{extra / 2**20:.0f}",
    ]

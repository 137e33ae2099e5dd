"""``python -m benchmarks train``: what a real step of fine-tuning costs with each loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor

from benchmarks.measure.largest_batch import attempt, largest_batch
from benchmarks.measure.noise import Options
from benchmarks.measure.processes import in_fresh_process
from benchmarks.measure.timing import timing
from benchmarks.measure.train_step import Job, Outcome, documents, time_steps, token_rows
from benchmarks.providers.at_head import LOSSES, NAMES, StepLoss
from benchmarks.results.loss_table import figure, show
from benchmarks.results.schema import PARTS, STEP_COLUMNS, append
from bft.config import TrainConfig
from bft.packaged import cache_root

Row = dict[str, Any]
Figures = dict[str, Callable[[Row], str]]


def _head(row: Row) -> str:
    ways = [row[f"head_{way}_seconds"] or 0.0 for way in ("forward", "backward")]
    return f"{sum(ways):.3f}" if any(ways) else ""


_STEPS: Figures = {
    "s a step": figure("seconds", ".3f"),
    "spread": figure("spread", ".1%"),
    "head": _head,
    "tokens/s": figure("tokens_per_second", ".0f"),
    "peak GiB": figure("peak_bytes", ".2f", 2**30),
}
_LARGEST: Figures = {
    "limit GiB": figure("limit_bytes", ".2f", 2**30),
    "sequences": figure("largest_batch", ".0f"),
    "peak GiB": figure("peak_bytes", ".2f", 2**30),
}


@dataclass(frozen=True)
class Config(Options):
    """Times real steps of fine-tuning with each loss, and finds the largest batch that fits.

    A step is forward, backward, clipping and AdamW, of a Hugging Face model on rows of real text.
    Every token is labelled, and each row is a document. Losses take turns at one model; times are
    medians. Peak memory is that of one step in a fresh process. benchmarks/README.md says what it
    counts, and how the largest batch is found.
    """

    model: str = "smollm2-135m"
    """A name that `bft train --model` takes, or a folder."""
    texts: Path | None = None
    """A file of documents, one a line; without it the demo's questions with their answers."""
    losses: tuple[str, ...] = tuple(n for n in NAMES if n != "cut-cross-entropy")
    """The losses. Name cut-cross-entropy to have it too: without a GPU it is slow to start."""
    weightings: tuple[Literal["plain", "bft"], ...] = ("plain", "bft")
    """The mean over tokens, or Balanced Fine-Tuning's weights."""
    batch: int = 4
    """Sequences in a step that is timed."""
    length: int = 256
    """Tokens in a sequence."""
    window: int = 256
    """Tokens in a confidence window of bft."""
    lora: bool = False
    """Train adapters of rank 16 on all linear layers instead of all parameters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 3
    """Steps of each loss that are timed, after one that warms up; 0 for no times."""
    memory: bool = True
    """Measure the peak memory of a step with `batch` sequences."""
    limit: tuple[str, ...] = ()
    """Find the largest batch that fits into so much memory, such as 4GiB 8GiB."""
    max_batch: int = 1024
    """The largest batch to try."""
    patience: float = 600.0
    """Seconds that a step may take in that search. A longer step ends it with "at least"."""

    def __post_init__(self) -> None:
        for name, low in {"batch": 1, "length": 2, "repeats": 0, "max_batch": 1}.items():
            value = getattr(self, name)
            if value < low:
                raise SystemExit(f"{name}: got {value}, expected at least {low}")
        unknown = [name for name in self.losses if name not in NAMES]
        if unknown:
            raise SystemExit(f"losses: got {unknown[0]!r}, expected some of {', '.join(NAMES)}")
        self.limits()

    def limits(self) -> list[int]:
        """The limits in bytes, ascending."""
        return sorted(parse_bytes(limit) for limit in self.limit)

    def job(self) -> Job:
        """The step to measure."""
        settings = TrainConfig(
            train_file=self.texts or cache_root() / "hpo" / "train.jsonl",
            model=self.model,
            window=self.window,
            lora_rank=16 if self.lora else 0,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype,
        )
        return Job(settings, self.device)


def main(config: Config) -> None:
    """Measures, prints, and writes if asked to; SystemExit if a setting is wrong."""
    facts = config.facts() | {"repeats": config.repeats}
    job = config.job()
    rows = max(config.batch * (config.repeats + 1), config.max_batch)
    ids = token_rows(documents(job.settings, config.texts), config.length, rows)
    asked = [x for x in LOSSES if x.name in config.losses and x.weighting in config.weightings]
    measured = _measure(config, job, asked, ids)
    able = [loss for loss, row in measured.items() if not row["reason"]]
    rows = [measured[loss] for loss in able if config.memory or config.repeats]
    rows += _search(config, job, able, ids)
    rows += [row for row in measured.values() if row["reason"]]
    what = f"{config.model}, {'LoRA' if config.lora else 'full fine-tuning'}"
    how = f"{config.dtype}, {config.device}{', memory kept' if config.keep_memory else ''}"
    title = f"{what}, {config.batch} x {config.length} tokens, {how}"
    _show(title, _STEPS, [row for row in rows if not row["limit_bytes"]])
    title = f"The largest batch of sequences of {config.length} tokens"
    _show(title, _LARGEST, [row for row in rows if row["limit_bytes"]])
    if config.output is not None:
        append(config.output, [row | facts for row in rows])


def _row(config: Config, loss: StepLoss) -> Row:
    """All columns of a measurement but the environment's; those to be filled in are empty."""
    what = {
        "loss": loss.name,
        "weighting": loss.weighting,
        "mode": "lora" if config.lora else "full",
        "model": Path(config.model).name,
        "texts": "hpo" if config.texts is None else config.texts.stem,
        "length": config.length,
        "dtype": config.dtype,
        "gradient_checkpointing": config.gradient_checkpointing,
        "memory_kept": config.keep_memory,
    }
    return what | dict.fromkeys(STEP_COLUMNS, "")


def _measure(config: Config, job: Job, losses: list[StepLoss], ids: Tensor) -> dict[StepLoss, Row]:
    """Times and peaks with ``config.batch`` of ``ids [rows, length]``, or the reasons for none."""
    samples: dict[str, list[dict[str, float]] | str] = {}
    dtype = getattr(torch, config.dtype)
    reasons = {x.label: x.why_missing(config.device, dtype) for x in losses}
    labels = [label for label, reason in reasons.items() if not reason]
    if config.repeats and labels:
        print(f"timing {config.repeats + 1} steps of each loss, in turns")
        turns = ids[: config.batch * (config.repeats + 1)].unflatten(0, (-1, config.batch))
        try:
            samples = in_fresh_process(time_steps, job, labels, turns, config.keep_memory)
        except RuntimeError as error:
            raise SystemExit(f"batch: {error}") from None
    rows = {}
    for loss in losses:
        reason, steps = reasons[loss.label], samples.get(loss.label, [])
        figures: Row = {"batch": config.batch}
        if isinstance(steps, str):
            reason = steps
        elif steps:
            whole = timing([sum(parts.values()) for parts in steps])
            figures |= {"seconds": whole.seconds, "spread": whole.spread}
            for part in PARTS:
                figures[f"{part}_seconds"] = timing([parts[part] for parts in steps]).seconds
            figures["tokens_per_second"] = config.batch * config.length / whole.seconds
        if config.memory and not reason:
            outcome = attempt(job, loss.label, ids[: config.batch])
            _say(loss, config.batch, outcome)
            reason, figures["peak_bytes"] = outcome.reason, outcome.peak or ""
        rows[loss] = _row(config, loss) | ({"reason": reason} if reason else figures)
    return rows


def _search(config: Config, job: Job, losses: list[StepLoss], ids: Tensor) -> list[Row]:
    """Finds the largest batch of ``ids [rows, length]`` for each loss and limit."""
    rows = []
    for loss in losses:
        peaks: dict[int, int] = {}
        for limit in config.limits():
            row = _row(config, loss) | {"limit_bytes": limit}
            rows.append(row)
            free = psutil.virtual_memory().available
            if config.device == "cpu" and limit > free:
                row["reason"] = f"limit: got {_gib(limit)}, expected at most the {_gib(free)} free"
                continue

            def run(batch: int, loss: StepLoss = loss, limit: int = limit) -> Outcome:
                how = {"limit": limit, "patience": config.patience}
                outcome = attempt(job, loss.label, ids[:batch], **how)
                _say(loss, batch, outcome, f" under {_gib(limit)}")
                return outcome

            batch, note = largest_batch(limit, config.max_batch, run, peaks)
            row |= {"largest_batch": batch, "peak_bytes": peaks.get(batch, ""), "note": note}
    return rows


def _say(loss: StepLoss, batch: int, outcome: Outcome, under: str = "") -> None:
    peak = "" if outcome.peak is None else f"peak {_gib(outcome.peak)}"
    told = f"{loss.label}, {batch} sequences{under}: {outcome.status}", peak, outcome.reason
    print(", ".join(filter(None, told)))


def parse_bytes(text: str) -> int:
    """``"8GiB"`` as bytes; SystemExit unless it is a positive number and a unit."""
    try:
        value = convert_file_size_to_int(int(text) if text.isdigit() else text)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise SystemExit(f"limit: got {text!r}, expected a number and a unit such as 8GiB or 500MB")
    return value


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _show(title: str, figures: Figures, rows: list[Row]) -> None:
    cells = [["loss", "weighting", *figures, ""]]
    for row in rows:
        written = (write(row) for write in figures.values())
        cells.append([row["loss"], row["weighting"], *written, row["reason"] or row["note"]])
    if rows:
        show(title, cells, left=2)

"""``python -m benchmarks train``: what a real step of fine-tuning costs with each loss."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import start, timing
from benchmarks.noise import quiet_load
from benchmarks.readings import PARTS
from benchmarks.results import append, environment
from benchmarks.train_losses import LOSSES, NAMES, StepLoss
from benchmarks.train_search import attempt, largest_batch
from benchmarks.train_worker import Job, Outcome, send_times
from bft.config import TrainConfig
from bft.encode import encode
from bft.load import pretrained
from bft.packaged import cache_root
from bft.records import read_jsonl
from bft.tasks import hpo

Row = dict[str, Any]
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Config:
    """Times real steps of fine-tuning with each loss, and finds the largest batch that fits.

    A step is forward, backward, clipping and AdamW, of a Hugging Face model on rows of real text,
    every token labelled, each row a document. Losses take turns at one model; their times are
    medians. Peak memory is that of one step in a fresh process. It counts all that the process
    holds: weights, gradients, the optimizer's state, activations, logits and whatever else the loss
    needs; on a CPU the interpreter and its libraries too (the resident set), on a GPU what torch's
    allocator hands out. A short step goes before, so that the optimizer's state is there, as in
    every step but a training's first. What loading the model took for a moment does not count. On a
    CPU freed memory returns to the system, as with MALLOC_MMAP_THRESHOLD_=131072 in a run's
    environment: otherwise the same step takes up to 40% more, or not, from run to run.

    The largest batch under a limit is run, and so is the next larger one, which does not fit: one
    sequence more below 16, about 5% more above.
    """

    model: str = "smollm2-135m"
    """A name that `bft train --model` takes, or a folder."""
    texts: Path | None = None
    """Documents, one a line; without it the demo's questions with their answers."""
    losses: tuple[str, ...] = tuple(n for n in NAMES if n != "cut-cross-entropy")
    """Those that are compiled (cut-cross-entropy off a GPU) are slow to start: ask by name."""
    weightings: tuple[Literal["plain", "bft"], ...] = ("plain", "bft")
    """The mean over tokens, or Balanced Fine-Tuning's weights."""
    batch: int = 4
    """Sequences in a step that is timed."""
    length: int = 256
    """Tokens in a sequence."""
    window: int = 256
    """Tokens in a confidence window of bft."""
    max_buffer_mib: int | None = None
    """Memory of our losses' logit blocks; 64 on a CPU and 528 on a GPU if not given."""
    lora: bool = False
    """Train adapters of rank 16 on all linear layers instead of all parameters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 3
    """Steps of each loss that are timed, after one that warms up; 0: no times."""
    memory: bool = True
    """Measure the peak memory of a step with `batch` sequences."""
    keep_memory: bool = False
    """Time with freed memory kept in the process: without the system's work for fresh pages."""
    limit: tuple[str, ...] = ()
    """Find the largest batch that fits into so much memory, such as 4GiB 8GiB."""
    max_batch: int = 1024
    """The largest batch to try."""
    patience: float = 600.0
    """Seconds that a step may take in that search. A longer one ends it: at least so many fit."""
    force: bool = False
    """Measure on a busy machine too."""
    output: Path | None = None
    """Append long-form CSV here."""

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
        """Bytes, ascending."""
        return sorted(parse_bytes(limit) for limit in self.limit)

    def job(self) -> Job:
        """The step."""
        settings = TrainConfig(
            train_file=self.texts or cache_root() / "hpo" / "train.jsonl",
            model=self.model,
            window=self.window,
            max_buffer_mib=self.max_buffer_mib,
            lora_rank=16 if self.lora else 0,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype,
        )
        return Job(settings, self.device)


def main(config: Config) -> None:
    """Measures, prints, and writes if asked to.

    Raises:
        SystemExit: a setting that cannot be, too little text, or a busy machine.
    """
    console = Console()
    load = quiet_load(config.force)
    job = config.job()
    timed = config.batch * (config.repeats + 1)
    ids = token_rows(_documents(config, job), config.length, max(timed, config.max_batch))
    asked = [x for x in LOSSES if x.name in config.losses and x.weighting in config.weightings]
    dtype = getattr(torch, config.dtype)
    reasons = {x.label: x.why_missing(config.device, dtype) for x in asked}
    able = [x for x in asked if not reasons[x.label]]
    rows: list[Row] = _measure(config, job, able, ids, reasons, console)
    rows += _search(config, job, [x for x in able if not reasons[x.label]], ids, console)
    rows += [_row(config, x) | {"reason": reasons[x.label]} for x in asked if reasons[x.label]]
    _print_steps(config, rows, console)
    _print_largest(config, rows, console)
    if config.output is not None:
        facts = environment(config.device) | {"load": load, "repeats": config.repeats}
        append(config.output, [row | facts for row in rows])


def _row(config: Config, loss: StepLoss) -> Row:
    """All columns of a measurement but the environment's, those still to be filled empty."""
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
    measured = (
        "batch",
        "seconds",
        "spread",
        *(f"{part}_seconds" for part in PARTS),
        "tokens_per_second",
        "peak_bytes",
        "limit_bytes",
        "largest_batch",
        "note",
        "reason",
    )
    return what | dict.fromkeys(measured, "")


def _measure(
    config: Config,
    job: Job,
    losses: list[StepLoss],
    ids: Tensor,  # [rows, length]
    reasons: dict[str, str],
    console: Console,
) -> list[Row]:
    """Times and peaks with ``config.batch`` sequences; what fails is told in ``reasons``."""
    samples: dict[str, list[dict[str, float]]] = {}
    labels = [loss.label for loss in losses]
    if config.repeats and labels:
        console.print(f"timing {config.repeats + 1} steps of each loss, in turns")
        turns = ids[: config.batch * (config.repeats + 1)].unflatten(0, (-1, config.batch))
        process, receiver = start(send_times, job, labels, turns, config.keep_memory, daemon=True)
        try:
            results = receiver.recv()
        except EOFError:
            process.join()
            raise SystemExit(f"batch: its process ended with {process.exitcode}") from None
        process.join()
        reasons |= {label: got for label, got in results.items() if isinstance(got, str)}
        samples = {label: got for label, got in results.items() if not isinstance(got, str)}
    rows = []
    for loss in losses:
        row = _row(config, loss) | {"batch": config.batch}
        if loss.label in samples:
            steps = samples[loss.label]
            whole = [sum(parts.values()) for parts in steps]
            row["seconds"] = timing(whole).seconds
            row["spread"] = spread(whole)
            for part in PARTS:
                row[f"{part}_seconds"] = timing([parts[part] for parts in steps]).seconds
            row["tokens_per_second"] = config.batch * config.length / row["seconds"]
        if config.memory and not reasons[loss.label]:
            outcome = attempt(job, loss.label, ids[: config.batch])
            _say(console, loss, config.batch, outcome)
            reasons[loss.label] = outcome.reason
            row["peak_bytes"] = "" if outcome.peak is None else outcome.peak
        if not reasons[loss.label] and (config.memory or config.repeats):
            rows.append(row)
    return rows


def _search(
    config: Config,
    job: Job,
    losses: list[StepLoss],
    ids: Tensor,  # [rows, length]
    console: Console,
) -> list[Row]:
    """The largest batch of each loss under each limit."""
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
                outcome = attempt(
                    job, loss.label, ids[:batch], limit=limit, patience=config.patience
                )
                _say(console, loss, batch, outcome, limit)
                return outcome

            found = largest_batch(limit, config.max_batch, run, peaks)
            row |= {
                "largest_batch": found.batch,
                "peak_bytes": peaks.get(found.batch, ""),
                "note": found.note,
            }
    return rows


def _say(
    console: Console, loss: StepLoss, batch: int, outcome: Outcome, limit: int | None = None
) -> None:
    under = "" if limit is None else f" under {_gib(limit)}"
    parts = [f"{loss.label}, {batch} sequences{under}: {outcome.status}"]
    parts += [] if outcome.peak is None else [f"peak {_gib(outcome.peak)}"]
    parts += [outcome.reason] if outcome.reason else []
    console.print(", ".join(parts), markup=False, highlight=False)


def spread(samples: list[float]) -> float | str:
    """Interquartile range over median; empty for fewer than two."""
    return timing(samples).spread if len(samples) > 1 else ""


def parse_bytes(text: str) -> int:
    """``"8GiB"`` as bytes.

    Raises:
        SystemExit: not a positive number and a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text.strip())
    value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value < 1:
        raise SystemExit(f"limit: got {text!r}, expected a number and a unit such as 8GiB or 500MB")
    return value


def _documents(config: Config, job: Job) -> Iterator[list[int]]:
    """Token ids of one document after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(pretrained(config.model)))
    if config.texts is None:
        folder = job.settings.train_file.parent
        hpo.build(folder)
        for record in read_jsonl(job.settings.train_file):
            yield encode(record, tokenizer).input_ids
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with config.texts.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield [*tokenizer(line.strip()).input_ids, *end]


def token_rows(documents: Iterable[list[int]], length: int, count: int) -> Tensor:
    """``[count, length]`` token ids: documents joined and cut, from the start again at their end.

    Raises:
        SystemExit: they do not fill one row.
    """
    tokens = itertools.chain.from_iterable(documents)
    found = list(itertools.islice(tokens, count * length))
    full = len(found) // length
    if full == 0:
        raise SystemExit(f"texts: got {len(found)} tokens, expected at least length, {length}")
    return torch.tensor(found[: full * length]).view(full, length)[torch.arange(count) % full]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _print_steps(config: Config, rows: list[Row], console: Console) -> None:
    rows = [row for row in rows if not row["limit_bytes"]]
    if not rows:
        return
    what = "LoRA" if config.lora else "full fine-tuning"
    table = Table(
        title=f"{config.model}, {what}, {config.batch} x {config.length} tokens, "
        f"{config.dtype}, {config.device}{', memory kept' if config.keep_memory else ''}"
    )
    for column in ("loss", "weighting"):
        table.add_column(column, no_wrap=True)
    for column in ("s a step", "spread", "head", "tokens/s", "peak"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        head = row["seconds"] and row["head_forward_seconds"] + row["head_backward_seconds"]
        table.add_row(
            row["loss"],
            row["weighting"],
            f"{row['seconds']:.3f}" if row["seconds"] else "",
            f"{row['spread']:.1%}" if row["spread"] != "" else "",
            f"{head:.3f}" if head else "",
            f"{row['tokens_per_second']:.0f}" if row["seconds"] else "",
            _gib(row["peak_bytes"]) if row["peak_bytes"] else "",
            row["reason"],
        )
    console.print(table)


def _print_largest(config: Config, rows: list[Row], console: Console) -> None:
    found = [row for row in rows if row["limit_bytes"]]
    if not found:
        return
    table = Table(title=f"The largest batch of sequences of {config.length} tokens")
    for column in ("loss", "weighting"):
        table.add_column(column, no_wrap=True)
    for column in ("limit", "sequences", "peak"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in found:
        table.add_row(
            row["loss"],
            row["weighting"],
            _gib(row["limit_bytes"]),
            str(row["largest_batch"]),
            _gib(row["peak_bytes"]) if row["peak_bytes"] else "",
            row["reason"] or row["note"],
        )
    console.print(table)

"""Throughput, memory and the run's log."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bft.loss import IGNORE, Targets
from bft_kernels import BalancedTokenStats

logger = logging.getLogger(__name__)

CONFIDENT = 0.9  # above this a label tells the model nothing new
LOW_CONFIDENCE = 0.5  # a window's, under which its token is part of a low-confidence run
HISTOGRAM_BINS = 20  # of equal width over [0, 1]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: the device's allocator on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StepMeter:
    """Sums over the micro-batches of one optimizer step.

    Sums stay on the device until :meth:`read`, so that a step waits for it once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.sums = torch.zeros((), dtype=torch.float64, device=device)  # of the parts of add
        self.sampled = False

    def add(
        self, loss: Tensor, targets: Targets, stats: BalancedTokenStats, normalize: str
    ) -> None:
        """One micro-batch: its part of the step's loss, and what that was made of."""
        target, document = targets.target.flatten(), targets.documents()
        labelled, confidence = target != IGNORE, stats.confidence.flatten()
        labels = torch.zeros_like(stats.sequence_weight, dtype=torch.float64)  # [S]
        labels.index_add_(0, document, labelled.double())
        low = labelled & (stats.window_confidence.flatten() < LOW_CONFIDENCE)
        # A token's share in the gradient of the loss, but for what all tokens are divided by.
        share = stats.token_weight.flatten().double() * stats.sequence_weight[document]
        if targets.token_weight is not None:
            share = torch.where(labelled, share * targets.token_weight.flatten(), 0.0)
        if normalize == "sequence":
            share = share / labels[document].clamp_min(1)
        self.sampled = stats.variance is not None
        parts = (
            loss.detach(),
            target.numel(),
            *(part.sum() for part in (labelled, stats.nll, confidence, stats.correct, low)),
            _run_starts(low, labelled, document).sum(),
            (labels > 0).sum(),
            stats.sequence_weight.sum(),
            stats.token_weight.sum(),
            share.abs().sum(),
            share.abs()[confidence > CONFIDENT].sum(),
            0.0 if stats.variance is None else (share.square() * stats.variance.flatten()).sum(),
            (share * (1 - confidence)).square().sum(),
        )
        values = [torch.as_tensor(part, dtype=torch.float64, device=self.device) for part in parts]
        counts = (_counts(confidence, labelled), _counts(stats.sequence_weight, labels > 0))
        self.sums = self.sums + torch.cat([torch.stack(values), *counts])

    def read(self, accelerator: Any) -> dict[str, Any]:
        """The step's weighted loss, counts, means (nll in nats) and histograms, of all ranks."""
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        loss, tokens, labelled, nll, confidence, correct, low, low_runs, *rest = sums
        documents, document_weight, token_weight, weight, on_confident, *rest = rest
        error, square, *counts = rest
        seconds = time.perf_counter() - self.started
        labels = max(labelled, 1.0)
        values = {
            "loss": loss,
            "tokens": tokens,
            "labelled": labelled,
            "documents": documents,
            "nll": nll / labels,
            "confidence": confidence / labels,
            "token_accuracy": correct / labels,
            "low_confidence": low / labels,
            "low_run_tokens": low / max(low_runs, 1.0),
            "document_weight": document_weight / max(documents, 1.0),
            "token_weight": token_weight / labels,
            "confident_weight": on_confident / weight if weight else 0.0,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_gib": peak_memory_bytes(self.device) / 2**30,
            "confidence_histogram": counts[:HISTOGRAM_BINS],
            "document_weight_histogram": counts[HISTOGRAM_BINS:],
        }
        if self.sampled:
            values["sampled_error"] = math.sqrt(error / square) if square else 0.0
        return values


def _run_starts(low: Tensor, labelled: Tensor, document: Tensor) -> Tensor:
    """Where a run of low labels starts: the label before it is not low, or another document's."""
    position = torch.arange(len(low), dtype=torch.int64, device=low.device)
    before = torch.where(labelled, position, -1).cummax(0).values.roll(1)
    before[:1] = -1
    return low & ~((before >= 0) & low[before] & (document[before] == document))


def _counts(values: Tensor, counted: Tensor) -> Tensor:
    """A histogram over [0, 1]; what lies outside is in the first or the last bin."""
    place = (values * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, place, counted.double())


def to_json(value: Any, **options: Any) -> str:
    """JSON as its standard has it: infinities and NaN, for which it has no word, become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(item) for name, item in part.items()}
        if isinstance(part, list | tuple):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **options)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an error of the disk says which file it is about, as a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def first_line(error: BaseException) -> str:
    """What an error says first; a library's advice may go on for long."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def write_json(path: Path, value: Any) -> None:
    """Writes a file as :func:`to_json` has it, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_text(to_json(value, indent=2), encoding="utf-8")


class MetricLog:
    """``metrics.jsonl``: one JSON object a line, written line by line; null where not finite.

    A resumed run drops the lines past its first step. Lines that a full disk does not take wait in
    memory, and go with the next that it takes.
    """

    def __init__(
        self,
        path: Path,
        *,
        enabled: bool,
        resumed_step: int = 0,
        track: Callable[[dict[str, Any], int], Any] | None = None,
    ) -> None:
        self.path, self.enabled, self.track = path, enabled, track
        self.rows: list[dict[str, Any]] = []
        if path.exists() and resumed_step > 0:
            self.rows = [row for row in _read_rows(path) if row["step"] <= resumed_step]
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")  # all of the old lines, or all new
            with naming(path):
                lines = "".join(to_json(row) + "\n" for row in self.rows)
                partial.write_text(lines, encoding="utf-8")
            os.replace(partial, path)
        self.waiting: list[str] = []

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes a row. What is named in it goes to ``track`` as well, for trackers to draw."""
        row = {"kind": kind, "step": step, **values}
        self.rows.append(row)
        if self.enabled:
            self.waiting.append(to_json(row) + "\n")
            try:
                self._append("".join(self.waiting).encode())
                self.waiting.clear()
            except OSError as error:
                if len(self.waiting) == 1:
                    logger.warning("%s: %s; its lines wait in memory", self.path, error.strerror)
        if self.track is not None:
            self.track({f"{kind}/{name}": value for name, value in values.items()}, step)

    def _append(self, lines: bytes) -> None:
        """Writes all of the lines, or none."""
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while rest := lines[file.tell() - before :]:
                    file.write(rest)
            except OSError:
                file.truncate(before)
                raise

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind: ``train`` or ``eval``."""
        return [row for row in self.rows if row["kind"] == kind]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run died
            break
        if row["kind"] == "train":  # all numbers
            row = {name: math.nan if v is None else v for name, v in row.items()}
        rows.append(row)
    return rows

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

from bft.loss import IGNORE
from bft_kernels import BalancedTokenStats

logger = logging.getLogger(__name__)


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
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, target: torch.Tensor, stats: BalancedTokenStats) -> None:
        """One micro-batch: its part of the step's loss, its ``target [B, T]``, its statistics."""
        of_labels = (target != IGNORE, stats.nll, stats.confidence, stats.correct)
        parts = (loss.detach(), target.numel(), *(values.sum() for values in of_labels))
        self.sums += torch.stack(
            [torch.as_tensor(part, dtype=torch.float64, device=self.device) for part in parts]
        )

    def read(self, accelerator: Any) -> dict[str, float]:
        """The step's weighted loss, counts, and means over labels (nll in nats), of all ranks."""
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        loss, tokens, labelled, nll, confidence, correct = sums
        seconds = time.perf_counter() - self.started
        labels = max(labelled, 1.0)
        return {
            "loss": loss,
            "tokens": tokens,
            "labelled": labelled,
            "nll": nll / labels,
            "confidence": confidence / labels,
            "token_accuracy": correct / labels,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_gib": peak_memory_bytes(self.device) / 2**30,
        }


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
        """Writes a row. Its numbers go to ``track`` as well, for TensorBoard to draw."""
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
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.track(numbers, step)

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

"""``python -m benchmarks gpu``: tests, speed, memory and figures of a GPU in one command.

Needs no network. Writes ``environment.json``, ``junit.xml``, ``loss.csv``, figures, ``summary.md``
and ``failures.txt`` into ``benchmarks/results/<name of the GPU>/``, each as soon as it exists and
in place of an earlier run's.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_inputs import REHEARSAL, SHAPES
from benchmarks.gpu_providers import CANDIDATES, find
from benchmarks.gpu_record import Record, nvidia_smi, slug
from benchmarks.gpu_report import draw_figures, write_summary
from benchmarks.gpu_speed import TURNS, measure_all
from benchmarks.gpu_suite import REHEARSED, SELECTED, run_suite
from benchmarks.readings import RESULTS

# Of all the time; what the tests leave goes to the measurements.
_TESTS_SHARE = 0.35
_REPORT_SHARE = 0.03


@dataclass(frozen=True)
class Config:
    """Correctness on the device, then seconds, x G, tokens/s and memory of all providers."""

    minutes: float = 9
    """For everything; what does not fit is cut, and recorded as that."""
    dry_run: bool = False
    """Rehearse on the CPU with tiny shapes, where Triton's interpreter stands in for the GPU."""
    output: Path | None = None
    """Instead of a folder named after the GPU; needed for `dry_run`."""
    providers: tuple[str, ...] = tuple(candidate.name for candidate in CANDIDATES)
    """Some of these, or your own as `module:function`."""
    tests: bool = True
    """Run the correctness tests first."""


def main(config: Config) -> None:
    """Tries every part.

    Raises:
        SystemExit: there is no GPU, a setting is wrong, or something failed (status 1).
    """
    record = Record(_folder(config), "cpu" if config.dry_run else "cuda")
    for name in config.providers:
        try:
            find(name)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    end = record.started + 60 * config.minutes
    record.clear()
    env = _environment(config.dry_run)

    def tests() -> None:
        limit = _TESTS_SHARE * (end - time.monotonic())
        run_suite(record, env, limit, REHEARSED if config.dry_run else SELECTED)

    def speed() -> None:
        shapes, turns = (REHEARSAL, 1) if config.dry_run else (SHAPES, TURNS)
        until = end - 60 * config.minutes * _REPORT_SHARE
        measure_all(record, env, until, shapes, config.providers, turns)
        record.note(nvidia_smi_after=nvidia_smi())

    parts: dict[str, Callable[[], None]] = {
        "environment": record.environment,
        **({"tests": tests} if config.tests else {}),
        "speed": speed,
        "figures": lambda: draw_figures(record),
    }
    for name, part in parts.items():
        try:
            part()
        except Exception:
            record.failure(name, traceback.format_exc())
        write_summary(record)
    record.say(f"written to {record.folder}; {len(record.failed)} failures")
    if record.failed:
        raise SystemExit(1)


def _folder(config: Config) -> Path:
    if config.dry_run:
        if config.output is None:
            raise SystemExit("output: got none, expected a folder for what a dry run writes")
        return config.output
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip or "none: it is a build for CPUs"
        driver = nvidia_smi().get("driver_version", "none found by nvidia-smi")
        raise SystemExit(
            f"gpu: found no GPU that torch can use (torch {torch.__version__}, its CUDA or ROCm: "
            f"{build}; driver: {driver}), expected one. Install the build of torch for your driver "
            "(https://pytorch.org/get-started/locally/), or rehearse on the CPU with "
            "--dry-run --output FOLDER"
        )
    return config.output or RESULTS / slug(torch.cuda.get_device_name(0))


def _environment(dry_run: bool) -> dict[str, str]:
    """Of the processes: Triton's interpreter is for the rehearsal only."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if dry_run:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env

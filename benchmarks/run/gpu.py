"""``python -m benchmarks gpu``: tests, speed, memory and figures of a GPU in one command.

Needs no network, and of packages torch, Triton, numpy and pytest. In this order: one sampled step,
capture in a CUDA graph and synchronisation, the hash, values, speed and memory; ``_cuda`` is
compiled for the GPU that is there meanwhile. Writes ``environment.json``, ``tests.jsonl``,
``loss.csv``, figures, ``summary.md``, ``failures.txt`` and ``logs`` into
``benchmarks/results/<name of the GPU>/``, each line when it is known: a run that is killed leaves
what it had found. A folder that has results stays as it is, the next one is named ``-2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure.suite import FIRST, VALUES, Build, run_suite
from benchmarks.measure.watched import REHEARSAL, SHAPES, TURNS, compile_ahead, measure_all
from benchmarks.providers.candidates import CANDIDATES, find
from benchmarks.results.folder import Record, nvidia_smi, slug
from benchmarks.results.readings import RESULTS
from benchmarks.results.summary import draw_figures, write_summary

# By when a part must be done, of all the time; what one leaves goes to the next.
_FIRST, _TRITON, _BUILD, _CUDA_FIRST, _CUDA, _COMPILED, _SPEED = (
    *(0.15, 0.35, 0.4, 0.45, 0.55, 0.65),
    0.97,
)
# Compiling kernels is most of the tests' time, and goes on beside the GPU.
_PROCESSES = 16
# Of each backend's tests; a rehearsal takes what the interpreter does in seconds.
_SELECTED = {FIRST: "{0}", VALUES: "{0} and not spill"}
_REHEARSED = {
    FIRST: "{0} and (graph and chunks-sampled or region2)",
    VALUES: "{0} and (ties_go and not cuda or never_chosen)",
}


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
    """Compile `_cuda` and run the correctness tests first."""


def parse(arguments: list[str], prog: str) -> Config:
    """Reads the command line; tyro, which reads the others', may not be installed here."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="for everything (%(default)s)")
    parser.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        help="rehearse on the CPU with tiny shapes, Triton's interpreter in the place of the GPU",
    )
    parser.add_argument(
        "--output", type=Path, help="instead of a folder named after the GPU; for --dry-run needed"
    )
    names = ", ".join(repr(candidate.name) for candidate in CANDIDATES)
    parser.add_argument(
        "--providers", nargs="+", help=f"your own as module:function, or some of {names}"
    )
    parser.add_argument(
        "--tests",
        action=argparse.BooleanOptionalAction,
        help="compile _cuda and run the correctness tests first (yes)",
    )
    parser.set_defaults(**{f.name: f.default for f in dataclasses.fields(Config)})
    given = vars(parser.parse_args(arguments))
    return Config(**given | {"providers": tuple(given["providers"])})


def main(config: Config) -> None:
    """Tries every part.

    Raises:
        SystemExit: there is no GPU, a setting is wrong, or something failed (status 1).
    """
    if not config.minutes > 0:
        raise SystemExit(f"minutes: got {config.minutes}, expected a positive number")
    record = Record(_folder(config), "cpu" if config.dry_run else "cuda", summarize=write_summary)
    for name in config.providers:
        try:
            find(name)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    record.open()
    for name, part in _parts(config, record).items():
        try:
            part()
        except Exception:
            record.failure(name, traceback.format_exc())
        write_summary(record)
    for what in record.cut:
        record.say(f"cut: {what}")
    record.say(f"written to {record.folder}; {len(record.failed)} failures, {len(record.cut)} cut")
    if record.failed:
        raise SystemExit(1)


def _parts(config: Config, record: Record) -> dict[str, Callable[[], None]]:
    """What is done, in its order."""
    env, names = _environment(config.dry_run), config.providers
    shapes, turns = (REHEARSAL, 1) if config.dry_run else (SHAPES, TURNS)
    processes = 2 if config.dry_run else min(_PROCESSES, len(os.sched_getaffinity(0)))
    builds: list[Build] = []

    def until(share: float) -> float:
        return record.started + 60 * config.minutes * share

    def check(title: str, files: tuple[str, ...], share: float) -> Callable[[], None]:
        backend = title.partition(" ")[0]
        chosen = (_REHEARSED if config.dry_run else _SELECTED)[files].format(backend)
        one = 1 if files == FIRST else processes  # of the first steps the order counts

        def run() -> None:
            missing = not config.dry_run and importlib.util.find_spec("bft_kernels._cuda") is None
            if backend == "cuda" and missing:
                record.say(f"{title}: not run, there is no bft_kernels._cuda")
            else:
                run_suite(record, env, until(share), title, files, chosen, one)

        return run

    def build() -> None:
        reason = builds[0].finish(until(_BUILD))
        if reason:
            record.note(build_reason=reason)
        record.look(env)

    def speed() -> None:
        measure_all(record, env, until(_SPEED), shapes, names, turns)
        record.note(nvidia_smi_after=nvidia_smi())

    tests: dict[str, Callable[[], None]] = {
        "start of the build": lambda: builds.append(Build(record, env)),
        "triton first": check("triton first", FIRST, _FIRST),
        "triton values": check("triton values", VALUES, _TRITON),
        "build": build,
        "cuda first": check("cuda first", FIRST, _CUDA_FIRST),
        "cuda values": check("cuda values", VALUES, _CUDA),
    }
    return {
        "environment": record.environment,
        "info": lambda: record.look(env),
        **(tests if config.tests else {}),
        "compiling": lambda: compile_ahead(record, env, until(_COMPILED), shapes, names, processes),
        "speed": speed,
        "figures": lambda: draw_figures(record),
    }


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

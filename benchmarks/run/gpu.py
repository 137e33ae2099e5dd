"""``python -m benchmarks gpu``: tests, speed, memory and figures of a GPU in one command.

It needs no network, and only torch, Triton, numpy and pytest. In this order it looks at one sampled
step, capture in a CUDA graph and synchronisation, the hash, values, speed and memory. Meanwhile
``_cuda`` is compiled for this GPU. It writes ``environment.json``, ``tests.jsonl``, ``loss.csv``,
figures, ``summary.md``, ``failures.txt`` and ``logs`` into ``benchmarks/results/<name of the
GPU>/``, each line when it is known, so that a run that is killed leaves what it had found. A folder
that has results stays as it is; the next one is named ``-2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure.build import Build
from benchmarks.measure.suite import FIRST, VALUES, Suite, run_suite
from benchmarks.measure.watched import TURNS, compile_ahead, measure_all
from benchmarks.providers.registry import PROVIDERS, telling_cases
from benchmarks.results.folder import Folder, nvidia_smi, slug
from benchmarks.results.schema import RESULTS
from benchmarks.results.summary import draw_figures, write_summary
from benchmarks.shapes import ON_A_GPU, REHEARSAL

# The part of the time by which each must be done; time that one leaves goes to the next.
_BY = {
    "triton first": 0.15,
    "triton values": 0.35,
    "build": 0.4,
    "cuda first": 0.45,
    "cuda values": 0.55,
    "compiling": 0.65,
    "speed": 0.97,
}
# Most of the tests' time is the compiler's, which runs on the CPU.
_PROCESSES = 16
# The tests of each backend; a rehearsal takes those that the interpreter runs in seconds.
_SELECTED = {"first": "{0}", "values": "{0} and not spill"}
_REHEARSED = {
    "first": "{0} and (graph and chunks-sampled or region2)",
    "values": "{0} and (ties_go and not cuda or never_chosen)",
}
_PROVIDERS = tuple(name for name, provider in PROVIDERS.items() if provider.backend != "cpu")


@dataclass(frozen=True)
class Config:
    """The settings; :func:`parse` describes them."""

    minutes: float = 9
    dry_run: bool = False
    output: Path | None = None
    providers: tuple[str, ...] = _PROVIDERS
    tests: bool = True


def parse(arguments: list[str], prog: str) -> Config:
    """Reads the command line, without tyro, which may not be installed here."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=kind)
    parser.set_defaults(**dataclasses.asdict(Config()))
    add, either = parser.add_argument, argparse.BooleanOptionalAction
    add("--minutes", type=float, help="time for everything; what does not fit is cut (%(default)s)")
    add("--dry-run", action=either, help="rehearse on the CPU: tiny shapes, Triton's interpreter")
    add("--output", type=Path, help="instead of a folder named after the GPU; --dry-run needs it")
    names = ", ".join(map(repr, _PROVIDERS))
    add("--providers", nargs="+", help=f"your own as module:function, or some of {names}")
    add("--tests", action=either, help="compile _cuda and run the correctness tests first (yes)")
    given = Config(**vars(parser.parse_args(arguments)))
    return dataclasses.replace(given, providers=tuple(given.providers))


def main(config: Config) -> None:
    """Runs every part; SystemExit with status 1 if something failed."""
    if not config.minutes > 0:
        raise SystemExit(f"minutes: got {config.minutes}, expected a positive number")
    path = _path(config)
    try:
        telling_cases(config.providers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    folder = Folder(path, "cpu" if config.dry_run else "cuda", summarize=write_summary)
    for name, part in _parts(config, folder).items():
        try:
            part()
        except Exception:
            folder.failure(name, traceback.format_exc())
        write_summary(folder)
    for what in folder.cut:
        folder.say(f"cut: {what}")
    folder.say(f"written to {folder.path}; {len(folder.failed)} failures, {len(folder.cut)} cut")
    if folder.failed:
        raise SystemExit(1)


def _parts(config: Config, folder: Folder) -> dict[str, Callable[[], object]]:
    """The parts of the run, in order."""
    cases = telling_cases(config.providers)
    shapes, turns = (REHEARSAL, 1) if config.dry_run else (ON_A_GPU, TURNS)
    processes = 2 if config.dry_run else min(_PROCESSES, len(os.sched_getaffinity(0)))
    selected = _REHEARSED if config.dry_run else _SELECTED
    start_build = functools.cache(lambda: Build(folder))

    def until(part: str) -> float:
        return folder.started + 60 * config.minutes * _BY[part]

    def check(title: str) -> None:
        backend, _, which = title.partition(" ")
        missing = not config.dry_run and importlib.util.find_spec("bft_kernels._cuda") is None
        if backend == "cuda" and missing:
            folder.say(f"{title}: not run, there is no bft_kernels._cuda")
            return
        # The first steps must run in their order.
        files, count = (FIRST, 1) if which == "first" else (VALUES, processes)
        suite = Suite(title, files, selected[which].format(backend), count)
        run_suite(suite, folder, until(title))

    def build() -> None:
        start_build().finish(until("build"))
        folder.look()

    def compiling() -> None:
        compile_ahead(folder, until("compiling"), shapes, cases, processes)

    def speed() -> None:
        measure_all(folder, until("speed"), shapes, cases, turns)
        folder.note(nvidia_smi_after=nvidia_smi())

    tests: dict[str, Callable[[], object]] = {
        "start of the build": start_build,
        "triton first": lambda: check("triton first"),
        "triton values": lambda: check("triton values"),
        "build": build,
        "cuda first": lambda: check("cuda first"),
        "cuda values": lambda: check("cuda values"),
    }
    return {
        "environment": folder.environment,
        "info": folder.look,
        **(tests if config.tests else {}),
        "compiling": compiling,
        "speed": speed,
        "figures": lambda: draw_figures(folder),
    }


def _path(config: Config) -> Path:
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

"""``python -m benchmarks loss``: what each loss costs, as tables and, if asked, as CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.measure.errors import first_rows, gradient_errors, truth
from benchmarks.measure.noise import MOST_SPREAD, quiet_load, refuse, too_noisy
from benchmarks.measure.timing import (
    Timing,
    extra_memory,
    first_line,
    keep_memory,
    step,
    time_all,
    time_turns,
)
from benchmarks.providers.registry import PROVIDERS, Case, cases, why_not
from benchmarks.results.loss_table import COLUMNS, show
from benchmarks.results.schema import append, check_columns, environment
from benchmarks.shapes import SHAPES, TOKENS, Problem, Recorded, Shape, Source, make_problem


@dataclass(frozen=True)
class Config:
    """Providers, weightings and modes beside the bare product 1G of the same run.

    Who cannot run is listed with the reason. benchmarks/README.md has the rules of measuring.
    """

    shapes: tuple[str, ...] = ("smollm2-135m",)
    """Heads of models (benchmarks/README.md lists them) or tiny, with synthetic inputs."""
    inputs: tuple[Path, ...] = ()
    """Instead of shapes: inputs of real models, written by `python -m benchmarks record`."""
    tokens: int | None = None
    """Instead of 2048."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    providers: tuple[str, ...] = tuple(PROVIDERS)
    weightings: tuple[str, ...] = ("plain", "bft")
    """The mean (plain), weighted by confidence (dft), balanced (bft)."""
    modes: tuple[str, ...] = ("both",)
    """No gradients (forward), dH and dW (both), dH of a frozen head (frozen)."""
    repeats: int = 5
    memory: bool = True
    """Measure extra memory, each in a fresh process."""
    errors: bool = True
    """Compare gradients of 64 tokens with float64; takes 16 bytes an entry of the head."""
    keep_memory: bool = False
    """Time with freed memory kept in the process: without the system's work for fresh pages."""
    max_spread: float = MOST_SPREAD
    """Refuse to report if the bare product's interquartile range exceeds this share of its median,
    or if the machine is busy at the start."""
    force: bool = False
    """Report all the same."""
    output: Path | None = None
    """Append long-form CSV here."""


def main(config: Config) -> None:
    """Measures, prints and writes.

    Raises:
        SystemExit: a setting is wrong, or the machine was too noisy.
    """
    try:
        asked = cases(config.providers, config.weightings, config.modes)
        sources = dict(_sources(config))
        if config.output is not None:
            check_columns(config.output, COLUMNS)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    load = quiet_load(config.force)
    if config.keep_memory:
        keep_memory()
    facts = environment(config.device) | {"load": load}
    for label, source in sources.items():
        for dtype in config.dtypes:
            rows = _measure(config, label, source, dtype, asked)
            show(Console(), rows)
            if config.output is not None:
                append(config.output, [_row(row | facts) for row in rows])


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    if config.tokens is not None and config.tokens < 1:
        raise ValueError(f"tokens: got {config.tokens}, expected at least 1")
    if config.repeats < 1:
        raise ValueError(f"repeats: got {config.repeats}, expected at least 1")
    for path in config.inputs:
        if not path.is_file():
            raise ValueError(
                f"inputs: got {path}, expected a file of `python -m benchmarks record`"
            )
        yield path.stem, Recorded(path, config.tokens or TOKENS)
    for name in () if config.inputs else config.shapes:
        if name not in SHAPES:
            raise ValueError(f"shapes: got {name!r}, expected some of {', '.join(SHAPES)}")
        shape = SHAPES[name]
        yield name, replace(shape, tokens=config.tokens or shape.tokens)


def _measure(
    config: Config, label: str, source: Source, dtype_name: str, asked: list[Case]
) -> list[dict[str, Any]]:
    """A row for 1G and for each case."""
    dtype = getattr(torch, dtype_name)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code for any shape, made for the second one, is slower
    problem = make_problem(source, dtype, config.device)
    shape = problem.shape
    reasons = {case: why_not(case, config.device, dtype) for case in asked}
    running: dict[Case, Case] = {}  # with the option that is the fastest here
    for case in _progress(asked, f"{label}: first runs"):
        if reasons[case]:
            continue
        try:
            running[case] = _with_option(case, problem, config.device)
        except Exception as error:  # whatever a peer raises is its reason
            reasons[case] = f"failed: {type(error).__name__}: {first_line(error)}"
    bare, times = time_all(problem, config.device, config.repeats, list(running.values()))
    refuse(too_noisy(bare, config.max_spread), config.force)
    errors = _errors(config, problem, running)
    del problem
    if config.device == "cuda":
        torch.cuda.empty_cache()  # the processes that follow need the room
    memory: dict[Case, int] = {}
    for case in _progress(running if config.memory else (), f"{label}: memory"):
        try:
            memory[case] = extra_memory(running[case], source, dtype, config.device)
        except RuntimeError as error:
            reasons[case] = f"memory not measured: {first_line(error)}"
    where = {
        "shape": label,
        "inputs": "synthetic" if isinstance(source, Shape) else "recorded",
        "tokens": shape.tokens,
        "width": shape.width,
        "vocabulary": shape.vocabulary,
        "dtype": dtype_name,
        "memory_kept": config.keep_memory,
        "device_kind": config.device,
        "repeats": config.repeats,
        "g_seconds": bare.seconds,
    }
    size = dtype.itemsize
    rows = [
        where | {"provider": "1G"} | _rates(bare, bare, shape.flops, _bytes(shape, "forward", size))
    ]
    for case in asked:
        row = where | {
            "provider": case.provider,
            "weighting": case.weighting,
            "mode": case.mode,
            "reason": reasons[case],
        }
        if case in running:
            flops = case.products * shape.flops
            taken = times[running[case]]
            row |= {"options": running[case].option, "extra_bytes": memory.get(case, "")}
            row |= _rates(taken, bare, flops, _bytes(shape, case.mode, size)) | errors[case]
        rows.append(row)
    return rows


def _with_option(case: Case, problem: Problem, device: str) -> Case:
    """The case with the fastest of its provider's options; every one is run once at least."""
    options = PROVIDERS[case.provider].options
    candidates = [replace(case, option=option) for option in options]
    if len(candidates) == 1:
        step(candidates[0], problem)
        return candidates[0]
    runs = {one: lambda one=one: step(one, problem) for one in candidates}
    times = time_turns(runs, device, 2)
    return min(candidates, key=lambda one: times[one].seconds)


def _errors(
    config: Config, problem: Problem, running: dict[Case, Case]
) -> dict[Case, dict[str, float]]:
    """Of each case's gradients; one weighting's truth is held at a time."""
    found: dict[Case, dict[str, float]] = {case: {} for case in running}
    if not config.errors:
        return found
    part = first_rows(problem)
    for weighting in dict.fromkeys(case.weighting for case in running):
        expected = truth(part, weighting)
        for case in running:
            if case.weighting == weighting:
                found[case] = gradient_errors(running[case], part, expected)
    return found


def _bytes(shape: Shape, mode: str, size: int) -> int:
    """Of the inputs read and the gradients written, each once."""
    hidden, weight = shape.tokens * shape.width, shape.vocabulary * shape.width
    gradients = {"forward": 0, "both": hidden + weight, "frozen": hidden}[mode]
    return size * (hidden + weight + gradients)


def _rates(taken: Timing, bare: Timing, flops: int, moved: int) -> dict[str, float]:
    return {
        "seconds": taken.seconds,
        "spread": taken.spread,
        "times_g": taken.seconds / bare.seconds,
        "flops_per_second": flops / taken.seconds,
        "bytes_per_second": moved / taken.seconds,
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """In the order of the columns, empty where there is nothing to say."""
    return {column: row.get(column, "") for column in COLUMNS}


def _progress(cases: Any, text: str) -> Any:
    """A bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    return track(
        list(cases), text, console=console, transient=True, disable=not console.is_terminal
    )

"""``python -m benchmarks loss``: what each loss costs, as tables and, if asked, as CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import shapes
from benchmarks.measure.errors import certificate, first_rows, step_errors, truth
from benchmarks.measure.memory import extra_memory, keep_memory
from benchmarks.measure.noise import MOST_SPREAD, Options, check_spread
from benchmarks.measure.processes import explain, in_fresh_process
from benchmarks.measure.timing import fastest_option, rates, step, time_all
from benchmarks.providers.registry import PROVIDERS, Case, cases, why_not
from benchmarks.results.loss_table import FIGURES, label, reasons, show, sizes, timed
from benchmarks.results.schema import COLUMNS, append, check_columns, full, grouped
from benchmarks.shapes import Problem, Recorded, Shape, Source, make_problem

Row = dict[str, Any]
_MODES = {
    "forward": "forward, no gradients",
    "both": "forward, dH and dW",
    "frozen": "forward and dH, frozen head",
}
# The figures for which a terminal has room.
_SHOWN = ("ms", "±", "x G", "Gflop/s", "GB/s", "MiB", "err dH", "err dW")
_SIDES = ("hidden", "weight")  # these have gradients


@dataclass(frozen=True)
class Config(Options):
    """Times providers, weightings and modes beside the bare GEMM 1G of the same run.

    Providers that cannot run are listed with the reason. benchmarks/README.md has the rules.
    """

    shapes: tuple[str, ...] = ("smollm2-135m",)
    """Sizes of your own, rows x width x vocabulary as in 1500x320x20000, or heads of models
    (benchmarks/README.md lists them) or tiny; inputs are synthetic."""
    inputs: tuple[Path, ...] = ()
    """Instead of shapes: files of real inputs, from `python -m benchmarks record` or your own
    (benchmarks/README.md has the format)."""
    tokens: int | None = None
    """Rows, instead of 2048 or of the rows that a shape names."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    providers: tuple[str, ...] = tuple(PROVIDERS)
    weightings: tuple[str, ...] = ("plain", "bft")
    """The loss: the mean (plain), weighted by confidence (dft), balanced (bft)."""
    modes: tuple[str, ...] = ("both",)
    """The gradients: none (forward), dH and dW (both), dH of a frozen head (frozen)."""
    repeats: int = 5
    memory: bool = True
    """Measure extra memory, each in a fresh process."""
    errors: bool = True
    """Compare gradients of 64 tokens with float64's; this takes 16 bytes an entry of the head."""
    max_spread: float = MOST_SPREAD
    """Refuse to report if the bare GEMM's interquartile range exceeds this part of its median,
    or if the machine is busy at the start."""


def main(config: Config) -> None:
    """Measures, prints and writes; SystemExit if the machine is too noisy or a setting is wrong."""
    try:
        asked = cases(config.providers, config.weightings, config.modes)
        sources = dict(_sources(config))
        if config.output is not None:
            check_columns(config.output, COLUMNS)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    facts = config.facts()
    if config.keep_memory:
        keep_memory()
    for name, source in sources.items():
        for dtype in config.dtypes:
            rows = _measure(config, name, source, dtype, asked)
            _show(rows, config.device)
            if config.output is not None:
                append(config.output, [full(row | facts) for row in rows])


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    for name, value in {"tokens": config.tokens, "repeats": config.repeats}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for path in config.inputs:
        shapes.load_recorded(path)
        yield path.stem, Recorded(path, config.tokens or shapes.TOKENS)
    for name in () if config.inputs else config.shapes:
        shape = shapes.shape_of(name)
        yield name, replace(shape, tokens=config.tokens or shape.tokens)


def _measure(
    config: Config, name: str, source: Source, dtype_name: str, asked: list[Case]
) -> list[Row]:
    """A row for 1G and for each case."""
    dtype = getattr(torch, dtype_name)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code for any shape, made at the second shape, is slower
    problem = make_problem(source, dtype, config.device)
    shape = problem.shape
    where: Row = {"shape": name, "dtype": dtype_name, "memory_kept": config.keep_memory}
    where["inputs"] = "synthetic" if isinstance(source, Shape) else "recorded"
    where |= asdict(shape) | {"reason": ""}
    rows: dict[Case, Row] = {}
    running: dict[Case, Case] = {}  # with the fastest option here
    for case in _progress(asked, f"{name}: first runs"):
        reason = why_not(case, config.device, dtype)
        rows[case] = where | case.columns | {"status": "unavailable", "reason": reason}
        if reason:
            continue
        try:
            running[case] = fastest_option(case, problem, config.device)
            step(running[case], problem)
        except Exception as error:  # whatever a peer raises is the reason
            running.pop(case, None)
            rows[case] |= {"status": "failed", "reason": f"failed: {explain(error)}"}
    bare, times = time_all(problem, config.device, config.repeats, list(running.values()))
    check_spread(bare, config.max_spread, config.force)
    for case, chosen in running.items():
        rows[case] |= {"status": "ok", "options": chosen.option}
        rows[case] |= rates(times[chosen], bare, shape, dtype.itemsize, chosen)
    if config.errors:
        _add_errors(rows, problem, running)
    del problem
    if config.device == "cuda":
        torch.cuda.empty_cache()  # the next processes need the room
    for case in _progress(running if config.memory else (), f"{name}: memory"):
        try:
            job = running[case], source, dtype, config.device
            rows[case]["extra_bytes"] = in_fresh_process(extra_memory, *job)
        except Exception as error:
            rows[case]["reason"] = f"memory not measured: {explain(error)}"
    product = where | {"provider": "1G", "status": "ok"} | rates(bare, bare, shape, dtype.itemsize)
    return [product, *rows.values()]


def _add_errors(rows: dict[Case, Row], problem: Problem, running: dict[Case, Case]) -> None:
    """Adds the errors of each case's first tokens; one weighting's truth is held at a time."""
    part = first_rows(problem)
    for weighting in dict.fromkeys(case.weighting for case in running):
        expected = truth(part, weighting)
        for case, chosen in running.items():
            if case.weighting == weighting:
                rows[case] |= step_errors(chosen, part, expected)
                rows[case] |= certificate(chosen, part, expected)


def _show(rows: Sequence[Row], device: str) -> None:
    """Prints a table for each weighting and mode, then the providers that could not run and why."""
    bare, *others = rows
    kept = ", memory kept" if bare["memory_kept"] else ""
    title = f"{bare['shape']} ({bare['inputs']} inputs): {sizes(bare)}, {device}{kept}"
    for (weighting, mode), same in grouped(others, "weighting", "mode").items():
        cells = [["", *_SHOWN]]
        for row in (bare, *timed(same)):
            cells.append([label(row), *(FIGURES[name](row) for name in _SHOWN)])
            if "certificate_hidden" in row:
                expected = {f"error_{x}": row.get(f"certificate_{x}", "") for x in _SIDES}
                cells.append(["  expected", *(FIGURES[name](expected) for name in _SHOWN)])
        show(f"{title}\n{weighting} loss, {_MODES[mode]}", cells, left=1)
    for text in reasons(others):
        print(f"missing: {text}")


def _progress(cases: Iterable[Case], text: str) -> Iterable[Case]:
    """A bar on standard error."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(list(cases), text, console=console, transient=True, disable=hidden)

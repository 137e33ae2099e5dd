"""``python -m benchmarks model``: times of GPUs that are not here, from ceilings and counted work.

The model first says what peers published, then what our kernels should take. Nothing here is
measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import model_entries, model_static
from benchmarks.model_entries import Kept
from benchmarks.model_hardware import GPUS, Gpu
from benchmarks.model_kernels import Kernel, g_seconds, total
from benchmarks.model_ours import certificate, exact, exact_memory, forward, forward_tiled
from benchmarks.model_peers import PUBLISHED, errors
from benchmarks.model_report import tables
from benchmarks.model_sampled import DESIGNS, GOALS, Goal, sampled
from benchmarks.results.environment import environment
from benchmarks.results.schema import append
from benchmarks.shapes import Shape

# Hidden sizes at which the engines of the forward are compared.
WIDTHS = (576, 1024, 2048, 4096, 8192)
# Kernels whose like no published figure tests.
UNTESTED = ("gather", "list", "thin", "empty", "count", "sort", "bits")


@dataclass(frozen=True)
class Config:
    """Predicted against published, then our own predictions with the model's error beside them."""

    gpus: tuple[str, ...] = tuple(GPUS)
    tokens: int = 8192
    width: int = 4096
    vocabulary: int = 131_072
    breakdown: str = "H100"
    """The GPU of which kernels are listed."""
    inputs: tuple[Path, ...] = ()
    """Real inputs, written by `python -m benchmarks record`: measure what is kept of them first."""
    input_tokens: int = 2048
    """Of each of `inputs`."""
    compile: bool = False
    """Compile the kernels first; without it, the figures recorded in model_static.json."""
    output: Path | None = None
    """Append long-form CSV here."""


def main(config: Config) -> None:
    """Predicts and prints.

    Raises:
        SystemExit: an unknown GPU.
    """
    for name in (*config.gpus, config.breakdown):
        if name not in GPUS:
            raise SystemExit(f"gpus: got {name!r}, expected some of {', '.join(GPUS)}")
    if config.compile:
        model_static.record()
    for path in config.inputs:
        model_entries.save(model_entries.measure(path, config.input_tokens))
    shape = Shape(config.tokens, config.width, config.vocabulary)
    rows = list(predictions(shape, [GPUS[name] for name in config.gpus], GPUS[config.breakdown]))
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    for table in tables(rows, [GPUS[name] for name in config.gpus], model_entries.load()):
        console.print(table)
    if config.output is not None:
        facts = environment("cpu")
        append(config.output, [row | facts for row in rows])


def predictions(shape: Shape, gpus: list[Gpu], detailed: Gpu) -> Iterator[dict[str, Any]]:
    """Every figure, a row each; times in seconds and, of ours, in G of the shape and GPU."""
    yield from published_rows()
    known = model_entries.load()
    for gpu in gpus:
        for goal in GOALS:
            yield from goal_rows(goal, shape, gpu, known)
        yield from extra_rows(shape, gpu)
        for design in DESIGNS:
            for kept in known:
                kernels = sampled(shape, gpu, kept, design)
                yield row("design", design.name, shape, gpu, kernels, kept)
        for width in WIDTHS:
            other = Shape(shape.tokens, width, shape.vocabulary)
            yield row("engine", "tiled", other, gpu, forward_tiled(other, gpu))
            yield row("engine", "chunked", other, gpu, forward(other, gpu))
    for goal in GOALS:
        chosen = costliest(goal, shape, detailed, known)
        for kernel in summed(goal.kernels(shape, detailed, chosen)):
            yield row(f"kernel of {goal.name}", kernel.name, shape, detailed, [kernel], chosen)


def published_rows() -> Iterator[dict[str, Any]]:
    """What peers published, and the model's error."""
    for figure in PUBLISHED:
        gpu = GPUS[figure.gpu]
        kernels = figure.algorithm(figure.shape, gpu)
        yield row("published", figure.peer, figure.shape, gpu, kernels) | {
            "published_seconds": figure.seconds,
            "error": figure.error,
            "calibrates": figure.calibrates,
        }


def goal_rows(goal: Goal, shape: Shape, gpu: Gpu, known: list[Kept]) -> Iterator[dict[str, Any]]:
    """Predictions of one goal: for each model's text, or once where nothing is sampled."""
    for kept in of_goal(goal, known):
        made = row("goal", goal.name, shape, gpu, goal.kernels(shape, gpu, kept), kept)
        if goal.eps is None:
            made |= {"model": "", "eps": ""}
        yield made | {"limit": goal.limit, "met": made["times_g"] <= goal.limit}


def extra_rows(shape: Shape, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """The exact loss by budget, with its memory; other calls."""
    for budget in (2**28, 2**29, 2**30, 2**31):
        made = row("other", f"exact, {budget >> 20} MiB", shape, gpu, exact(shape, gpu, budget))
        yield made | {"extra_bytes": exact_memory(shape, budget)}
    frozen = exact(shape, gpu, trains_weight=False)
    yield row("other", "exact, frozen head", shape, gpu, frozen)
    yield row("other", "losses, tiled", shape, gpu, forward_tiled(shape, gpu))
    yield row("other", "certificate of a sampled gradient", shape, gpu, certificate(shape, gpu))


def of_goal(goal: Goal, known: list[Kept]) -> list[Kept]:
    """What is kept at the goal's ``eps``, of each model."""
    return [kept for kept in known if kept.eps == goal.eps] or known[:1]


def costliest(goal: Goal, shape: Shape, gpu: Gpu, known: list[Kept]) -> Kept:
    """The model's text that takes longest."""
    return max(of_goal(goal, known), key=lambda kept: total(goal.kernels(shape, gpu, kept), gpu))


def summed(kernels: list[Kernel]) -> Iterator[Kernel]:
    """Kernels of the same name as one."""
    names = dict.fromkeys(kernel.name for kernel in kernels)
    for name in names:
        alike = [kernel for kernel in kernels if kernel.name == name]
        counted = {kernel: alike.count(kernel) for kernel in dict.fromkeys(alike)}
        if len(counted) == 1:
            yield alike[0].times(len(alike))
        else:  # chunks of unequal length
            yield from (kernel.times(count) for kernel, count in counted.items())


def row(
    kind: str,
    name: str,
    shape: Shape,
    gpu: Gpu,
    kernels: list[Kernel],
    kept: Kept | None = None,
) -> dict[str, Any]:
    """One predicted time."""
    seconds = total(kernels, gpu)
    untested = [kernel for kernel in kernels if any(word in kernel.name for word in UNTESTED)]
    low, high = interval(seconds)
    return {
        "kind": kind,
        "name": name,
        "gpu": gpu.name,
        **asdict(shape),
        "model": kept.model if kept else "",
        "eps": kept.eps if kept else "",
        "seconds": seconds,
        "times_g": seconds / g_seconds(shape, gpu),
        "low_seconds": low,
        "high_seconds": high,
        "untested": total(untested, gpu) / seconds,
        "published_seconds": "",
        "error": "",
        "calibrates": "",
        "limit": "",
        "met": "",
        "extra_bytes": "",
    }


def interval(seconds: float) -> tuple[float, float]:
    """What a prediction of ``seconds`` stands for, by the errors of the figures like ours."""
    found = errors()
    return seconds / (1 + found[-1]), seconds / (1 + found[0])

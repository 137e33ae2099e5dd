"""``python -m benchmarks loss``: times and memory of one shape, as a table, if asked as CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import extra_memory, keep_memory, time_all
from benchmarks.providers import PEERS, PROVIDERS
from benchmarks.results import append, environment
from benchmarks.shapes import SHAPES, Recorded, Source, make_problem


@dataclass(frozen=True)
class Config:
    """Forward, dH and dW of each provider, against the bare product 1G of the same run."""

    shape: Literal["tiny", "smollm2-135m", "qwen2.5-0.5b", "gemma3-270m"] = "smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 3
    inputs: Path | None = None
    """Of a real model, written by `python -m benchmarks record`; replaces `shape`."""
    tokens: int = 2048
    """Of `inputs`."""
    providers: tuple[str, ...] = tuple(PROVIDERS)
    memory: bool = True
    keep_memory: bool = False
    """Time with freed memory kept in the process: without the system's work for fresh pages."""
    output: Path | None = None
    """Append long-form CSV here."""


def main(config: Config) -> None:
    """Measures and prints."""
    known = PROVIDERS | PEERS
    unknown = [name for name in config.providers if name not in known]
    if unknown:
        raise SystemExit(f"providers: got {unknown[0]!r}, expected some of {', '.join(known)}")
    source: Source = SHAPES[config.shape]
    if config.inputs is not None:
        source = Recorded(config.inputs, config.tokens)
    if config.keep_memory:
        keep_memory()
    dtype, names = getattr(torch, config.dtype), list(config.providers)
    problem = make_problem(source, dtype, config.device)
    shape = problem.shape
    times = time_all(problem, config.device, config.repeats, names)
    del problem
    memory = {
        name: extra_memory(name, source, dtype, config.device) if config.memory else 0
        for name in names
    }
    label = config.shape if config.inputs is None else config.inputs.stem
    table = Table(
        title=f"{label}: N {shape.tokens}, D {shape.width}, V {shape.vocabulary}, "
        f"{config.dtype}, {config.device}{', memory kept' if config.keep_memory else ''}"
    )
    for column in ("", "seconds", "x G", "extra MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, taken in times.items():
        extra = f"{memory[name] / 2**20:.0f}" if config.memory and name in memory else ""
        table.add_row(name, f"{taken:.3f}", f"{taken / times['1G']:.2f}", extra)
    Console().print(table)
    if config.output is not None:
        facts = environment(config.device)
        append(
            config.output,
            [
                {
                    "provider": name,
                    "shape": label,
                    "tokens": shape.tokens,
                    "width": shape.width,
                    "vocabulary": shape.vocabulary,
                    "dtype": config.dtype,
                    "memory_kept": config.keep_memory,
                    **facts,
                    "seconds": taken,
                    "times_g": taken / times["1G"],
                    "extra_bytes": memory.get(name, ""),
                }
                for name, taken in times.items()
            ],
        )

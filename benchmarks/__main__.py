"""``python -m benchmarks``: times and memory of one shape, as a table and, if asked, as CSV."""

from __future__ import annotations

import csv
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import extra_memory, time_all
from benchmarks.providers import PEERS, PROVIDERS
from benchmarks.shapes import SHAPES, Recorded, Shape, Source, make_problem
from bft_kernels import info


@dataclass(frozen=True)
class Config:
    """Forward, dH and dW of each provider, against the bare product 1G of the same run."""

    shape: Literal["tiny", "smollm2-135m", "qwen2.5-0.5b", "gemma3-270m"] = "smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 3
    inputs: Path | None = None
    """torch.save((hidden [N, D], weight [V, D], target [N])) of a real model; replaces `shape`."""
    tokens: int = 2048
    """Of `inputs`."""
    providers: tuple[str, ...] = tuple(PROVIDERS)
    memory: bool = True
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
        f"{config.dtype}, {config.device}"
    )
    for column in ("", "seconds", "x G", "extra MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, taken in times.items():
        extra = f"{memory[name] / 2**20:.0f}" if config.memory and name in memory else ""
        table.add_row(name, f"{taken:.3f}", f"{taken / times['1G']:.2f}", extra)
    Console().print(table)
    if config.output is not None:
        write_csv(config, label, shape, times, memory)


def write_csv(
    config: Config, label: str, shape: Shape, times: dict[str, float], memory: dict[str, int]
) -> None:
    """One row a provider, with what is needed to compare it with another run."""
    assert config.output is not None
    facts = info()
    rows = [
        {
            "provider": name,
            "shape": label,
            "tokens": shape.tokens,
            "width": shape.width,
            "vocabulary": shape.vocabulary,
            "dtype": config.dtype,
            "device": facts["devices"].get(f"{config.device}:0", platform.machine()),
            "threads": torch.get_num_threads(),
            "torch": facts["versions"]["torch"],
            "bft-kernels": facts["versions"]["bft-kernels"],
            "seconds": taken,
            "times_g": taken / times["1G"],
            "extra_bytes": memory.get(name, ""),
        }
        for name, taken in times.items()
    ]
    fresh = not config.output.exists()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks"))

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
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import SHAPES
from bft_kernels import info


@dataclass(frozen=True)
class Config:
    """Forward, dH and dW of each provider, against the bare product 1G of the same run."""

    shape: Literal["tiny", "smollm2-135m", "qwen2.5-0.5b", "gemma3-270m"] = "smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 3
    providers: tuple[str, ...] = tuple(PROVIDERS)
    memory: bool = True
    output: Path | None = None
    """Append long-form CSV here."""


def main(config: Config) -> None:
    """Measures and prints."""
    unknown = [name for name in config.providers if name not in PROVIDERS]
    if unknown:
        raise SystemExit(f"providers: got {unknown[0]!r}, expected some of {', '.join(PROVIDERS)}")
    shape, dtype = SHAPES[config.shape], getattr(torch, config.dtype)
    names = list(config.providers)
    times = time_all(shape, dtype, config.device, config.repeats, names)
    memory = {
        name: extra_memory(name, shape, dtype, config.device) if config.memory else 0
        for name in names
    }
    table = Table(
        title=f"{config.shape}: N {shape.tokens}, D {shape.width}, V {shape.vocabulary}, "
        f"{config.dtype}, {config.device}"
    )
    for column in ("", "seconds", "x G", "extra MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, taken in times.items():
        extra = f"{memory[name] / 2**20:.0f}" if config.memory and name in memory else ""
        table.add_row(name, f"{taken:.3f}", f"{taken / times['1G']:.2f}", extra)
    Console().print(table)
    if config.output is not None:
        write_csv(config, times, memory)


def write_csv(config: Config, times: dict[str, float], memory: dict[str, int]) -> None:
    """One row a provider, with what is needed to compare it with another run."""
    assert config.output is not None
    facts = info()
    shape = SHAPES[config.shape]
    rows = [
        {
            "provider": name,
            "shape": config.shape,
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

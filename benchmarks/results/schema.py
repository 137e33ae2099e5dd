"""Long-form CSV: one row a measurement, with what is needed to compare it with another run."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ABSENT = "not installed"
# Beside torch and this package.
_OTHERS = ("transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "verl")


def version(distribution: str) -> str:
    """Of an installed package, or that it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def environment(device: str) -> dict[str, Any]:
    """Commit, device, thread count and versions; of peers those that are installed."""
    others = {name: version(name) for name in _OTHERS}
    return {
        "commit": _commit(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "bft-kernels": version("bft-kernels"),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {v}" for name, v in others.items() if v != ABSENT),
    }


def _commit() -> str:
    """Of the working tree, marked if that has changed; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """A file that is there must have these columns.

    Raises:
        ValueError: it has others; rows of two kinds in one file could not be read.
    """
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != list(columns):
        raise ValueError(
            f"output: got {path}, whose columns are {','.join(found)}, expected a new file or one "
            f"with the columns {','.join(columns)}"
        )


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file, and its header if the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    check_columns(path, list(rows[0]))
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)

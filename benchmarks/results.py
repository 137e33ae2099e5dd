"""Long-form CSV: one row a measurement, with what is needed to compare it with another run."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bft_kernels import info


def environment(device: str) -> dict[str, Any]:
    """Device, thread count and versions."""
    facts = info()
    return {
        "device": facts["devices"].get(f"{device}:0", platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": facts["versions"]["torch"],
        "bft-kernels": facts["versions"]["bft-kernels"],
    }


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file, and its header if the file is new."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)

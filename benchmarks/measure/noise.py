"""The options of every command that measures; all refuse to report times of a busy machine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.measure.timing import Timing
from benchmarks.results.environment import environment

# The spread of the bare GEMM, interquartile range over median, above which a machine is too noisy.
MOST_SPREAD = 0.15
# The 1-minute load average a core, at the start, above which other programs are computing.
MOST_LOAD = 1.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to measure, how, and where to write."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    keep_memory: bool = False
    """Keep freed memory in the process, so that times have no system work for fresh pages."""
    force: bool = False
    """Measure and report on a busy machine too."""
    output: Path | None = None
    """Append the results to this CSV file, in long form."""

    def facts(self) -> dict[str, Any]:
        """Environment and load; SystemExit if other programs compute, without ``force``."""
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > MOST_LOAD * cores:
            most = f"expected up to {MOST_LOAD * cores:.1f}: others are computing, or your own run"
            most += " of a moment ago still counts, for a minute"
            _refuse(f"the load average is {load:.1f} on {cores} cores, {most}", self.force)
        return environment(self.device) | {"load": load}


def check_spread(bare: Timing, most: float, force: bool, where: str = "") -> None:
    """SystemExit if the bare GEMM's time differs too much from turn to turn, without ``force``."""
    if bare.spread > most:
        _refuse(
            f"{where}the bare GEMM took {bare.seconds:.4f} s with a spread (interquartile range "
            f"over median) of {bare.spread:.0%}, expected up to --max-spread {most:.0%}",
            force,
        )


def _refuse(reason: str, force: bool) -> None:
    if not force:
        raise SystemExit(
            f"too noisy to measure, nothing is reported or written: {reason}. Wait for a quiet "
            "machine or take more --repeats; --force reports all the same"
        )
    print(f"noisy, reported because of --force: {reason}", file=sys.stderr)

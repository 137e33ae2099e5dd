"""What is not reported: times of a machine on which others compute."""

from __future__ import annotations

import os
import sys

from benchmarks.measure.timing import Timing

# Interquartile range over median of the bare product above which a machine is too noisy.
MOST_SPREAD = 0.15
# Of the 1-minute load average over the cores, at the start: more means that others are computing.
MOST_LOAD = 1.5


def quiet_load(force: bool) -> float:
    """The 1-minute load average.

    Raises:
        SystemExit: others are computing, without ``force``.
    """
    load = os.getloadavg()[0]
    refuse(too_busy(load, os.cpu_count() or 1), force)
    return load


def too_busy(load: float, cores: int) -> str:
    """Why not to start; empty if others leave the machine alone."""
    if load <= MOST_LOAD * cores:
        return ""
    return (
        f"the load average is {load:.1f} on {cores} cores, expected up to {MOST_LOAD * cores:.1f}: "
        "others are computing"
    )


def too_noisy(bare: Timing, most: float) -> str:
    """Why not to report; empty if the bare product took about the same time in every turn."""
    if bare.spread <= most:
        return ""
    return (
        f"the bare product took {bare.seconds:.4f} s with a spread (interquartile range over "
        f"median) of {bare.spread:.0%}, expected up to --max-spread {most:.0%}"
    )


def refuse(reason: str, force: bool) -> None:
    """Tells a reason and goes on with ``force``, or if there is none.

    Raises:
        SystemExit: there is one, without ``force``.
    """
    if not reason:
        return
    if not force:
        raise SystemExit(
            f"too noisy to measure, nothing is reported or written: {reason}. Wait for a quiet "
            "machine or take more --repeats; --force reports all the same"
        )
    print(f"noisy, reported because of --force: {reason}", file=sys.stderr)

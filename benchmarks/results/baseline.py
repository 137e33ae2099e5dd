"""Saved ratios to the bare GEMM, and when a ratio counts as slower."""

from __future__ import annotations

import json
from pathlib import Path

BASELINES = Path(__file__).with_name("baselines")
# A baseline holds on other machines: what is no product weighs up to a fifth more where products
# are fast, and small shapes are measured to a tenth.
TOLERANCE = 1.35


def load(path: Path) -> dict[str, float]:
    """Ratios by the test's name, from a file of pytest-benchmark; none if there is no file."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {one["name"]: float(one["extra_info"]["times_g"]) for one in saved["benchmarks"]}


def complaint(ratio: float, stored: float | None) -> str:
    """What to say of a ratio that is too large for the one stored; empty if it is not."""
    if stored is None or ratio <= TOLERANCE * stored:
        return ""
    return (
        f"took {ratio:.2f} G, expected up to {TOLERANCE} x {stored:.2f} G, the saved baseline; "
        "if that is meant, save a new one with --rebase"
    )

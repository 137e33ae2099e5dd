"""Saved ratios to the bare GEMM, and when a ratio counts as slower."""

from __future__ import annotations

import json
from pathlib import Path

BASELINES = Path(__file__).with_name("baselines")
# A baseline must hold on other machines. Where products are fast, ratios are up to a fifth higher,
# and the times of small shapes vary by a tenth.
TOLERANCE = 1.35


def load(path: Path) -> dict[str, float]:
    """Ratios by name of test, from a file of pytest-benchmark; none if there is no file."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {one["name"]: float(one["extra_info"]["times_g"]) for one in saved["benchmarks"]}


def complaint(ratio: float, stored: float | None) -> str:
    """The complaint about a ratio that is too large for the stored one; empty if it is not."""
    if stored is None or ratio <= TOLERANCE * stored:
        return ""
    return (
        f"took {ratio:.2f} G, expected up to {TOLERANCE} x {stored:.2f} G, the saved baseline; "
        "if that is meant, save a new one with --rebase"
    )

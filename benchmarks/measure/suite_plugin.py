"""A plugin of pytest: a share of the tests, the most telling first, with outcomes as they come.

Every test gets a line of JSON when it is selected, another when it starts and another when it ends.
So the last lines of a run that was killed say what passed and what was running.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

# Variables of the environment: the file for outcomes; "place/number of shares"; the parent.
OUTCOMES, SHARE, PARENT = "BFT_GPU_OUTCOMES", "BFT_GPU_SHARE", "BFT_GPU_PARENT"
# The exit status after an error that has made the device useless to the process.
DEVICE_LOST = 77
_DETAIL = 6000  # characters


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends a line for each row in one call, because other processes write to the file, too."""
    with path.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test; none if there is no file."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut off by a full disk
            row = json.loads(line)
            found[row["test"]] = row
    return found


def count_cut(rows: Mapping[str, dict[str, Any]]) -> int:
    """Tests that were selected or started, and never ended."""
    return sum(row["outcome"] in ("selected", "started") for row in rows.values())


def told(rows: Mapping[str, dict[str, Any]]) -> str:
    """How many tests ended in which way."""
    counts, cut = Counter(row["outcome"] for row in rows.values()), count_cut(rows)
    ended = ", ".join(f"{counts[how]} {how}" for how in ("passed", "failed", "skipped"))
    return ended + (f", {cut} cut" if cut else "")


def place_of(name: str, count: int) -> int:
    """Which of the shares a test belongs to, the same in every process.

    Cases of one test use much the same Triton kernels, which each process compiles for itself. So
    they stay together, and a process compiles 100 of 470 kernels instead of 130.
    """
    if "offsets_beyond" in name:  # takes gigabytes: never two at once
        return 0
    if "triton" in name:
        name = name.partition("[")[0] + ("chunks" if "chunks" in name else "")
    return zlib.crc32(name.encode()) % count


def _write(test: str, outcome: str, **row: Any) -> None:
    write(Path(os.environ[OUTCOMES]), [{"test": test, "outcome": outcome} | row])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps this process's share, without the tests that an earlier process ran, and orders it.

    First comes one case of every test, then a second one, so that a cut loses more of the same.
    """
    place, count = map(int, os.environ[SHARE].split("/"))
    path = Path(os.environ[OUTCOMES])
    done = {name for name, row in read(path).items() if row["outcome"] != "selected"}
    names = {i.nodeid for i in items if place_of(i.nodeid, count) == place} - done
    mine = [item for item in items if item.nodeid in names]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
    seen: Counter[str] = Counter()

    def rank(item: pytest.Item) -> tuple[bool, int]:
        function = item.nodeid.partition("[")[0]
        seen[function] += 1
        return "offsets_beyond" in function, seen[function]

    items[:] = sorted(mine, key=rank)
    write(path, [{"test": item.nodeid, "outcome": "selected"} for item in items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure of its own."""
    if report.failed:
        _write(report.nodeid, "failed", seconds=0, detail=_shortened(report.longrepr))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Writes what runs; stops if the parent process is gone."""
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)
    _write(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes how a test ended."""
    if report.passed and report.when != "call":
        return
    detail = "" if report.passed else _shortened(report.longrepr)
    _write(report.nodeid, report.outcome, seconds=round(report.duration, 3), detail=detail)
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(DEVICE_LOST)


def _shortened(reason: Any) -> str:
    """The end of a traceback, which says what failed, or why a test is skipped."""
    return str(reason[2] if isinstance(reason, tuple) else reason)[-_DETAIL:]

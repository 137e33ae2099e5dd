"""Options and reports of the pytest-benchmark suite: ratios to 1G beside the saved ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure.noise import MOST_SPREAD
from benchmarks.results import baseline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_KEPT, _STATS = ("name", "group", "extra_info"), ("min", "median", "iqr", "rounds")
# The name of the test, its ratio, and the saved ratio if there is one.
_RATIOS = pytest.StashKey[list[tuple[str, float, float | None]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options: where the baseline is, and whether to write it."""
    group = parser.getgroup("baseline")
    path = baseline.BASELINES / f"{DEVICE}.json"
    group.addoption("--baseline", type=Path, default=path, help="saved ratios (%(default)s)")
    spread = "of the bare GEMM, above which nothing is compared (%(default)s)"
    group.addoption("--max-spread", type=float, default=MOST_SPREAD, help=spread)
    group.addoption("--rebase", action="store_true", help="compare with nothing, save the ratios")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Sets options before pytest-benchmark reads them."""
    config.stash[_RATIOS] = []
    if config.getoption("rebase"):
        path: Path = config.getoption("baseline")
        path.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(path)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keeps the file small, and leaves out the name of the machine."""
    output_json["machine_info"] = {
        "processor": output_json["machine_info"].get("cpu", {}).get("brand_raw", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    output_json["benchmarks"] = [
        {key: one[key] for key in _KEPT} | {"stats": {key: one["stats"][key] for key in _STATS}}
        for one in output_json["benchmarks"]
    ]


@pytest.fixture
def check_ratio(request: pytest.FixtureRequest) -> Any:
    """Fails a test of this package if its ratio to 1G is too far above the saved one."""
    option = request.config.getoption
    saved = {} if option("rebase") else baseline.load(option("baseline"))

    def check(ratio: float, spread: float, *, ours: bool) -> None:
        name = request.node.name
        request.config.stash[_RATIOS].append((name, ratio, saved.get(name)))
        complaint = baseline.complaint(ratio, saved.get(name))
        if complaint and ours and spread > option("max_spread"):
            pytest.skip(f"too noisy to compare: the bare GEMM's spread is {spread:.0%}")
        if complaint and ours:
            pytest.fail(f"{name} {complaint}", pytrace=False)

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the ratios."""
    if ratios := config.stash[_RATIOS]:
        terminalreporter.section("multiples of the bare GEMM (1G)")
    width = max((len(name) for name, *_ in ratios), default=0)
    for name, ratio, stored in ratios:
        change = "no baseline" if stored is None else f"saved {stored:6.2f}  {ratio / stored:5.2f}x"
        terminalreporter.write_line(f"{name:{width}}  {ratio:6.2f}  {change}")

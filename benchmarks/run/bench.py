"""``python -m benchmarks bench``: whether losses became slower, as ratios to the bare product."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.measure.noise import MOST_SPREAD
from benchmarks.measure.timing import bare_product, fastest_blocking, step, time_turns
from benchmarks.providers.losses import documents
from benchmarks.providers.registry import MODES, PROVIDERS, cases, why_not
from benchmarks.results.environment import environment
from benchmarks.results.loss_table import show
from benchmarks.results.schema import RESULTS, append, read
from benchmarks.shapes import SHAPES, Problem, Shape, make_problem
from bft_kernels import token_weights

BASELINES = RESULTS / "baselines"
# A baseline holds on other machines: what is no product weighs up to a fifth more where products
# are fast, and small shapes are measured to a tenth.
TOLERANCE = 1.35
SMALL = {"tiny": SHAPES["tiny"], "small": Shape(512, 256, 16_384)}
_TURNS = 7
_WEIGHTS = "bft weighting"
_FACTS = ("commit", "processor", "threads", "torch")  # of the environment

Run = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Config:
    """Compares ratios to the bare product with the saved ones, in about a minute.

    The bare product is timed in every turn, and the ratio is that of the fastest turns: what others
    compute meanwhile only ever adds. Ours fail above 1.35 times the saved ratio, peers are shown.
    """

    only: str = ""
    """Measure only what has this in its name."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    baseline: Path | None = None
    """Saved ratios; benchmarks/results/baselines/<device>.csv if not given."""
    max_spread: float = MOST_SPREAD
    """Of the bare product, above which nothing is compared."""
    rebase: bool = False
    """Compare with nothing, and save the ratios."""


def main(config: Config) -> None:
    """Measures, and compares or saves.

    Raises:
        SystemExit: something of ours became slower.
    """
    path = config.baseline or BASELINES / f"{config.device}.csv"
    saved = {} if config.rebase else load(path)
    rows, slower = [], []
    cells = [["", "shape", "x G", "saved", "ratio"]]
    for name, shape, run in _runs(config):
        ratio, spread = _ratio(run, shape, config.device)
        rows.append({"name": name, "shape": shape, "times_g": ratio})
        stored = saved.get((name, shape))
        compared = (
            ["", "no baseline"] if stored is None else [f"{stored:.2f}", f"{ratio / stored:.2f}"]
        )
        cells.append([name, shape, f"{ratio:.2f}", *compared])
        complaint = complain(ratio, stored) if name.startswith("bft") else ""
        if complaint and spread > config.max_spread:
            print(
                f"{name}, {shape}: too noisy to compare, the bare product's spread is {spread:.0%}"
            )
        elif complaint:
            slower.append(f"{name}, {shape} {complaint}")
    show("multiples of the bare product (1G)", cells, left=1)
    if config.rebase:
        facts = environment(config.device)
        path.unlink(missing_ok=True)
        append(path, [row | {fact: facts[fact] for fact in _FACTS} for row in rows])
    if slower:
        raise SystemExit("\n".join(slower))


def load(path: Path) -> dict[tuple[str, str], float]:
    """Ratios by name and shape; none if there is no file."""
    return {(row["name"], row["shape"]): float(row["times_g"]) for row in read(path)}


def complain(ratio: float, stored: float | None) -> str:
    """What to say of a ratio that is too large for the one stored; empty if it is not."""
    if stored is None or ratio <= TOLERANCE * stored:
        return ""
    return (
        f"took {ratio:.2f} G, expected up to {TOLERANCE} x {stored:.2f} G, the saved baseline; "
        "if that is meant, save a new one with --rebase"
    )


def _runs(config: Config) -> Iterator[tuple[str, str, Run]]:
    """Ours in every mode, peers where weighted is compared with weighted; only who runs here."""
    dtype = _dtype(config.device)
    quick = [name for name, provider in PROVIDERS.items() if not provider.compiles]
    ours = [name for name in quick if PROVIDERS[name].backend]
    asked = [*cases(ours, ["plain"], ["both"]), *cases(ours, ["bft"], MODES)]
    asked += cases([name for name in quick if name not in ours], ["bft"], ["both"])
    named: list[tuple[str, str, Any]] = [
        (str(case), shape, case)
        for case in asked
        for shape in SMALL
        if config.only in str(case) and not why_not(case, config.device, dtype)
    ]
    yield from named
    if config.only in _WEIGHTS:
        yield _WEIGHTS, "tiny", _weights


def _weights(problem: Problem) -> Tensor:
    """Token and sequence weights alone, of documents of 128 tokens."""
    confidence = torch.linspace(0, 1, problem.target.numel(), device=problem.target.device)
    return token_weights(confidence, documents(problem)).token_weight


def _ratio(run: Run, shape: str, device: str) -> tuple[float, float]:
    """Of the fastest turns, and the spread of the bare product's."""
    problem, bare = _setting(shape, device)
    times = time_turns({"bare": bare, "own": lambda: step(run, problem)}, device, _TURNS)
    return times["own"].fastest / times["bare"].fastest, times["bare"].spread


@functools.cache
def _setting(shape: str, device: str) -> tuple[Problem, Callable[[], None]]:
    """A problem, and its bare product in the fastest blocking."""
    problem = make_problem(SMALL[shape], _dtype(device), device)
    blocking = fastest_blocking(problem, device, repeats=5)
    return problem, functools.partial(bare_product, problem, *blocking)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32

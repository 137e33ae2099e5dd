"""Tests whether losses became slower, by their ratios to the bare GEMM: ``make bench``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure.timing import bare_product, fastest_blocking, seconds, step, timing
from benchmarks.providers.losses import documents
from benchmarks.providers.registry import MODES, PROVIDERS, Case, cases, why_not
from benchmarks.shapes import SHAPES, Problem, Shape, make_problem
from bft_kernels import token_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SMALL = {"tiny": SHAPES["tiny"], "small": Shape(512, 256, 16_384)}
ROUNDS = 7


def measured() -> list[Case]:
    """Our losses in every mode, and weighted losses of peers; only those that run here."""
    quick = [one for one in PROVIDERS.values() if not one.compiles]
    ours, peers = ([x.name for x in quick if bool(x.backend) == own] for own in (True, False))
    asked = [*cases(ours, ["plain"], ["both"]), *cases(ours, ["bft"], MODES)]
    asked += cases(peers, ["bft"], ["both"])
    return [case for case in asked if not why_not(case, DEVICE, DTYPE)]


@functools.cache
def _problem(shape: str) -> Problem:
    return make_problem(SMALL[shape], DTYPE, DEVICE)


@functools.cache
def _bare(shape: str) -> Callable[[], None]:
    """A run of the bare GEMM in its fastest blocking."""
    problem = _problem(shape)
    blocking = fastest_blocking(problem, DEVICE, repeats=5)
    return functools.partial(bare_product, problem, *blocking)


def _ratio(run: Callable[[Problem], Tensor], shape: str, benchmark: Any) -> tuple[float, float]:
    """Times rounds of a step and of the bare GEMM: their ratio, and the spread of the latter.

    The ratio is that of the fastest rounds, because other programs only ever add time.
    """
    bare: list[float] = []
    benchmark.group = shape
    benchmark.pedantic(
        lambda: seconds(lambda: step(run, _problem(shape)), DEVICE),
        setup=lambda: bare.append(seconds(_bare(shape), DEVICE)),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled")
    del bare[0]  # of the warm-up
    ratio = benchmark.stats.stats.min / min(bare)
    benchmark.extra_info["times_g"] = ratio
    return ratio, timing(bare).spread


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize(
    "case", measured(), ids=lambda case: f"{case.provider}, {case.weighting}, {case.mode}"
)
def test_loss(case: Case, shape: str, benchmark: Any, check_ratio: Any) -> None:
    """A step of one provider, weighting and mode."""
    ratio, spread = _ratio(case, shape, benchmark)
    check_ratio(ratio, spread, ours=bool(PROVIDERS[case.provider].backend))


def test_weighting(benchmark: Any, check_ratio: Any) -> None:
    """Token and sequence weights alone, for documents of 128 tokens."""

    def weights(problem: Problem) -> Tensor:
        confidence = torch.linspace(0, 1, problem.target.numel(), device=DEVICE)
        return token_weights(confidence, documents(problem)).token_weight

    check_ratio(*_ratio(weights, "tiny", benchmark), ours=True)

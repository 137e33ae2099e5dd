"""No tensor of N x V elements, temporaries within the budget, and a flat process peak."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll, ops
from bft_kernels.plan import plan_columns, plan_rows

ROWS, WIDTH, VOCABULARY = 256, 8, 3000
BUDGET = 2**18  # the logits would take 12 times as much


class Allocations(TorchDispatchMode):
    """The largest tensor that any op returns, and the most bytes of new storage alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self.alive: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not _is(tensor):
                continue
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self.alive[storage._cdata] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive.values()))
        return result


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


class Watched:
    """A backend that runs under a dispatch mode, which is off inside custom ops otherwise."""

    def __init__(self, backend: Any, mode: TorchDispatchMode) -> None:
        self.backend, self.mode = backend, mode

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self.mode:
                return getattr(self.backend, name)(*arguments)

        return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    mode, select = Allocations(), ops.select
    monkeypatch.setattr(ops, "select", lambda *arguments: Watched(select(*arguments), mode))
    return mode


def reduced(p: Any, **options: Any) -> Tensor:
    return linear_cross_entropy(*p.args, **options)


def per_token(p: Any, **options: Any) -> Tensor:
    return linear_nll(*p.args, **options).square().sum()


def short_documents(p: Any, **options: Any) -> Tensor:
    documents = torch.arange(0, ROWS + 1, 4)
    return balanced_linear_cross_entropy(*p.args, cu_seqlens=documents, window=3, **options)


def one_long_document(p: Any, **options: Any) -> Tensor:
    return balanced_linear_cross_entropy(*p.args, window=16, **options)


FROZEN_HEAD = ("weight",)
PATHS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[str, ...]]] = {
    "recompute": (per_token, {}, ()),
    "unit": (per_token, {}, FROZEN_HEAD),
    "in the forward": (reduced, {}, ()),
    "short documents": (short_documents, {}, ()),
    "a long document": (one_long_document, {}, ()),
    "sampled": (per_token, {"gradient": "sampled", "eps": 2**-6}, ()),
    "sampled, frozen head": (one_long_document, {"gradient": "sampled", "eps": 2**-6}, FROZEN_HEAD),
    "softcap": (per_token, {"softcap": 5.0}, ()),
    "softcap in the forward": (reduced, {"softcap": 5.0, "label_smoothing": 0.1}, ()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_of_all_logits(path, dtype, problem, seen) -> None:
    function, options, frozen = PATHS[path]
    p = problem(ROWS, WIDTH, VOCABULARY, dtype=dtype, frozen=frozen, scale=4.0)
    with seen:
        function(p, max_buffer_bytes=BUDGET, **options).backward()
    assert seen.largest < ROWS * VOCABULARY / 4
    assert seen.largest > VOCABULARY, "the mode saw no block at all"


@pytest.mark.parametrize("path", PATHS)
def test_statistics_without_gradients_stay_in_blocks(path, problem, seen) -> None:
    function, options, _ = PATHS[path]
    p = problem(ROWS, WIDTH, VOCABULARY, dtype=torch.float32)
    with torch.no_grad(), seen:
        result = function(p, max_buffer_bytes=BUDGET, **options)
    assert not result.requires_grad
    assert seen.largest < ROWS * VOCABULARY / 4


@pytest.mark.parametrize("path", [path for path in PATHS if "sampled" not in path])
def test_temporaries_fit_the_budget(path, problem, seen) -> None:
    """Storage alive at a time: gradients, vectors, and what the budget allows."""
    function, options, frozen = PATHS[path]
    p = problem(ROWS, WIDTH, VOCABULARY, dtype=torch.float32, frozen=frozen)
    with seen:
        function(p, max_buffer_bytes=BUDGET, **options).backward()
    gradients = 4 * WIDTH * (2 * ROWS + VOCABULARY * ("weight" not in frozen))
    vectors = 4 * 64 * (ROWS + VOCABULARY // 64)
    assert seen.peak <= BUDGET + gradients + vectors


PEAK = """
import sys, torch
from bft_kernels import linear_cross_entropy, linear_nll
rows, gradient, function = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
weight = torch.randn(32_000, 16).requires_grad_()
hidden = (2 * torch.randn(rows, 16)).requires_grad_()
target = torch.randint(32_000, (rows,))
def step(h, w, t):
    if function == "per_token":
        linear_nll(h, w, t, gradient=gradient, max_buffer_bytes=2**22, eps=2**-6).sum().backward()
    else:
        linear_cross_entropy(h, w, t, gradient=gradient, max_buffer_bytes=2**22).backward()
step(hidden[:2], weight, target[:2])
hidden.grad = weight.grad = None
open("/proc/self/clear_refs", "w").write("5")
step(hidden, weight, target)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("function", "gradient"),
    [("per_token", "exact"), ("reduced", "exact"), ("per_token", "sampled")],
)
def test_peak_of_the_process_hardly_grows_with_rows(function, gradient) -> None:
    """At 4 times the rows, logits would grow by 183 MiB; what may grow is O(N)."""
    peaks = []
    for rows in (500, 2000):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(rows), gradient, function],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks


@given(
    rows=st.integers(1, 5000),
    vocabulary=st.integers(1, 300_000),
    width=st.integers(1, 5000),
    budget=st.integers(1, 2**28),
    widen=st.booleans(),
    scratch=st.integers(1, 5),
)
def test_row_plans_fit_the_budget(rows, vocabulary, width, budget, widen, scratch) -> None:
    plan = plan_rows(rows, vocabulary, width, 4, budget, widen=widen, scratch=scratch)
    assert 1 <= plan.tile_rows <= plan.chunk_rows <= rows
    assert 1 <= plan.weight_rows <= vocabulary
    used = 4 * vocabulary * (plan.chunk_rows + scratch * plan.tile_rows)
    used += 4 * width * plan.weight_rows if widen else 0
    least = 4 * vocabulary * (1 + scratch) + 4 * width * widen  # one row of each is always held
    assert used <= max(budget, least)


@given(
    rows=st.integers(1, 100_000),
    vocabulary=st.integers(1, 300_000),
    width=st.integers(1, 5000),
    budget=st.integers(1, 2**28),
    scratch=st.integers(0, 2),
)
def test_column_plans_fit_the_budget(rows, vocabulary, width, budget, scratch) -> None:
    plan = plan_columns(rows, vocabulary, width, 4, budget, scratch=scratch)
    assert 1 <= plan.rows <= rows
    assert 1 <= plan.columns <= vocabulary
    used = 4 * plan.columns * ((1 + scratch) * plan.rows + 2 * width)
    assert used <= max(budget, 4 * (1 + scratch + 2 * width))

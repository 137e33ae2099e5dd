"""How much Python a call runs before its first GEMM, and how deep: counted, not timed.

Counted are calls of functions whose file lies in the package, warm, with default options and
gradients required, up to the first product or the first call into ``_cpu``.
"""

import sys
import traceback
from pathlib import Path

import pytest
import torch

import bft_kernels
from bft_kernels import (
    balanced_linear_cross_entropy,
    dispatch,
    linear_cross_entropy,
    linear_nll,
)
from tests.support.problems import draw_problem

PACKAGE = str(Path(bft_kernels.__file__).parent)
FUNCTIONS = [linear_nll, linear_cross_entropy, balanced_linear_cross_entropy]
FRAMES, FILES_DEEP, FILES, CALLS = 6, 4, 10, 70


class Counter:
    """Counts calls until the first GEMM, or the first call into `_cpu`, calls :meth:`stop`."""

    def __init__(self):
        self.calls, self.files, self.stack = [], set(), []

    def __call__(self, frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            self.calls.append(f"{name.removeprefix(PACKAGE)}:{frame.f_code.co_name}")
            self.files.add(name)

    def stop(self):
        if sys.getprofile() is not self:
            return
        sys.setprofile(None)
        for frame in traceback.extract_stack():
            if frame.filename.startswith(PACKAGE):
                self.stack.append(f"{frame.filename.removeprefix(PACKAGE)}:{frame.name}")


@pytest.fixture
def counter(backend, monkeypatch):
    counter = Counter()

    def watched(function):
        def call(*args, **how):
            counter.stop()
            return function(*args, **how)

        return call

    firsts = {torch: ["mm", "addmm"], torch.Tensor: ["addmm_"]}
    if backend == "cpu":
        native = pytest.importorskip("bft_kernels._cpu")
        firsts[native] = ["OnlineSoftmax", "gradient_block", "run_team"]
    for place, names in firsts.items():
        for name in names:
            monkeypatch.setattr(place, name, watched(getattr(place, name)))
    yield counter
    sys.setprofile(None)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_little_python_runs_before_the_first_product(function, backend, counter, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    p = draw_problem(64, 32, 1000, dtype=torch.float32)
    for _ in range(3):  # the first calls import and cache
        function(*p.args)
    sys.setprofile(counter)
    function(*p.args)
    assert counter.stack, "no product was seen"
    deep = {place.partition(":")[0] for place in counter.stack}
    assert len(counter.stack) <= FRAMES, counter.stack
    assert len(deep) <= FILES_DEEP, counter.stack
    assert len(counter.files) <= FILES, sorted(counter.files)
    assert len(counter.calls) <= CALLS, counter.calls

"""Launches that compile their kernels and run nothing; see :func:`bft_kernels.warm_up`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """A context in which launches, on tensors without values, only compile for ``device``.

    Several kernels are compiled at the same time with Triton 3.5 or later.
    """
    compile_or_launch = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **how: Any) -> Any:
        return compile_or_launch(self, *args, warmup=True, **how)

    with ExitStack() as stack:
        if device.index is not None:
            stack.enter_context(torch.cuda.device(device))
        if hasattr(triton, "AsyncCompileMode"):
            pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
            stack.enter_context(triton.AsyncCompileMode(pool))
        stack.enter_context(patch.object(JITFunction, "run", run))
        yield

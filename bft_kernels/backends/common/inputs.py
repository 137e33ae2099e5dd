"""The operands of a call, as kernels on a device take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bft_kernels.backends.common.rows import DeviceRows
from bft_kernels.problem import Problem
from bft_kernels.settings import Settings


def rows_contiguous(x: Tensor) -> Tensor:
    """``x [n, D]`` with ``stride(1) == 1``; it is copied if it has another stride."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous()


@dataclass(frozen=True)
class Inputs:
    """The operands of one call. Each row of ``hidden`` and ``weight`` is contiguous."""

    call: Problem
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None  # [V]
    rows: DeviceRows

    @staticmethod
    def of(problem: Problem) -> Inputs:
        bias = None if problem.bias is None else problem.bias.contiguous()
        return Inputs(
            problem,
            rows_contiguous(problem.hidden),
            rows_contiguous(problem.weight),
            problem.target.contiguous(),
            bias,
            DeviceRows.of(problem.target, problem.settings.ignore_index),
        )

    @property
    def settings(self) -> Settings:
        return self.call.settings

    @property
    def shape(self) -> tuple[int, int, int]:
        """``N``, ``V``, ``D``."""
        return self.call.shape

"""The operands of a call, as kernels on a device take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bft_kernels.backends.gpu.rows import DeviceRows
from bft_kernels.config import CoreConfig

# What a forward writes for each row, by the names of `Forward`.
ROW_RESULTS = ("loss", "nll", "lse", "lse_low", "entropy", "correct")


def rows_contiguous(x: Tensor) -> Tensor:
    """``x [n, D]`` with ``stride(1) == 1``; a copy if it is not so."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous()


@dataclass(frozen=True)
class DeviceInputs:
    """The operands of one call; each row of ``hidden`` and ``weight`` lies together."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None  # [V]
    rows: DeviceRows
    config: CoreConfig

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        config: CoreConfig,
    ) -> Self:
        rows = DeviceRows.of(target, config.ignore_index)
        bias = None if bias is None else bias.contiguous()
        hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
        return cls(hidden, weight, target.contiguous(), bias, rows, config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``N``, ``V``, ``D``."""
        return self.hidden.shape[0], *self.weight.shape

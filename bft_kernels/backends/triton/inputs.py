"""The operands of a call as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from bft_kernels.backends.triton.configs import (
    Tile,
    rows_contiguous,
    splits_for,
    tile_for,
    triton_dtype,
)
from bft_kernels.backends.triton.rows import DeviceRows
from bft_kernels.config import CoreConfig

# What either forward writes for each row, by the names of `Forward`.
ROW_RESULTS = ("loss", "nll", "lse", "lse_low", "entropy", "correct")


@dataclass(frozen=True)
class Inputs:
    """The operands of one call as the kernels take them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None  # [V]
    rows: DeviceRows
    config: CoreConfig

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, config: CoreConfig
    ) -> Inputs:
        rows = DeviceRows.of(target, config.ignore_index)
        bias = None if bias is None else bias.contiguous()
        hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
        return Inputs(hidden, weight, target.contiguous(), bias, rows, config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``N``, ``V``, ``D``."""
        return self.hidden.shape[0], *self.weight.shape

    def splits(self, rows: int) -> Splits:
        """How ``rows`` of the rows are shared out."""
        tile = tile_for(self.config, self.hidden, self.weight)
        row_blocks = triton.cdiv(rows, tile.block_n)
        tiles = triton.cdiv(self.shape[1], tile.block_v)
        each = triton.cdiv(tiles, splits_for(row_blocks, tiles, self.hidden))
        return Splits(tile, row_blocks, triton.cdiv(tiles, each), each)

    def arguments(self) -> dict[str, object]:
        """What every kernel that makes logits takes."""
        config = self.config
        return {
            "hidden_ptr": self.hidden,
            "weight_ptr": self.weight,
            "bias_ptr": self.bias,
            "target_ptr": self.target,
            "order_ptr": self.rows.order,
            "count_ptr": self.rows.count,
            "stride_hn": self.hidden.stride(0),
            "stride_wv": self.weight.stride(0),
            "inverse_temperature": 1.0 / config.temperature,
            "softcap": config.softcap or 1.0,
            "D": self.hidden.shape[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_CAP": config.softcap is not None,
            "OPERAND": triton_dtype(config.operand_dtype),
        }


@dataclass(frozen=True)
class Splits:
    """Programs of a pass over all logits: a block of rows and a part of the vocabulary each."""

    tile: Tile
    row_blocks: int
    count: int
    tiles: int  # of each split; the last may have fewer

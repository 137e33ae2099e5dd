"""The operands of a call as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from bft_kernels.backends.common.inputs import DeviceInputs
from bft_kernels.backends.triton.configs import (
    Tile,
    splits_for,
    tile_for,
    triton_dtype,
)


@dataclass(frozen=True)
class Inputs(DeviceInputs):
    """The operands of one call as the kernels take them."""

    def splits(self, rows: int) -> Splits:
        """How ``rows`` of the rows are shared out."""
        tile = tile_for(self.call, self.hidden, self.weight)
        row_blocks = triton.cdiv(rows, tile.block_n)
        tiles = triton.cdiv(self.shape[1], tile.block_v)
        each = triton.cdiv(tiles, splits_for(row_blocks, tiles, self.hidden))
        return Splits(tile, row_blocks, triton.cdiv(tiles, each), each)

    def arguments(self) -> dict[str, object]:
        """What every kernel that makes logits takes."""
        call = self.call
        return {
            "hidden_ptr": self.hidden,
            "weight_ptr": self.weight,
            "bias_ptr": self.bias,
            "target_ptr": self.target,
            "order_ptr": self.rows.order,
            "count_ptr": self.rows.count,
            "stride_hn": self.hidden.stride(0),
            "stride_wv": self.weight.stride(0),
            "inverse_temperature": 1.0 / call.settings.temperature,
            "softcap": call.settings.softcap or 1.0,
            "D": self.hidden.shape[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_CAP": call.settings.softcap is not None,
            "OPERAND": triton_dtype(call.operand),
        }


@dataclass(frozen=True)
class Splits:
    """Programs of a pass over all logits: a block of rows and a part of the vocabulary each."""

    tile: Tile
    row_blocks: int
    count: int
    tiles: int  # of each split; the last may have fewer

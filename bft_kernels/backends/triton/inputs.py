"""The operands of a call as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.triton.configs import (
    Tile,
    splits_for,
    tile_for,
    triton_dtype,
)


@dataclass(frozen=True)
class Splits:
    """Programs of a pass over all logits: a block of rows and a part of the vocabulary each."""

    tile: Tile
    row_blocks: int
    count: int
    tiles: int  # of each split; the last may have fewer


def splits_of(inputs: Inputs, rows: int) -> Splits:
    """How ``rows`` of the rows are shared out."""
    tile = tile_for(inputs.call, inputs.hidden, inputs.weight)
    row_blocks = triton.cdiv(rows, tile.block_n)
    tiles = triton.cdiv(inputs.shape[1], tile.block_v)
    each = triton.cdiv(tiles, splits_for(row_blocks, tiles, inputs.hidden))
    return Splits(tile, row_blocks, triton.cdiv(tiles, each), each)


def arguments_of(inputs: Inputs) -> dict[str, object]:
    """What every kernel that makes logits takes."""
    call = inputs.call
    return {
        "hidden_ptr": inputs.hidden,
        "weight_ptr": inputs.weight,
        "bias_ptr": inputs.bias,
        "target_ptr": inputs.target,
        "order_ptr": inputs.rows.order,
        "count_ptr": inputs.rows.count,
        "stride_hn": inputs.hidden.stride(0),
        "stride_wv": inputs.weight.stride(0),
        "inverse_temperature": 1.0 / call.settings.temperature,
        "softcap": call.settings.softcap or 1.0,
        "D": inputs.hidden.shape[1],
        "HAS_BIAS": inputs.bias is not None,
        "HAS_CAP": call.settings.softcap is not None,
        "OPERAND": triton_dtype(call.operand),
    }

"""The operands of a call as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.common.rows import ROW_RESULTS
from bft_kernels.backends.triton.configs import (
    Tile,
    precision_for,
    splits_for,
    tile_for,
    triton_dtype,
)


class Call(NamedTuple):
    """What every kernel over logits takes as one argument."""

    bias_ptr: Tensor | None  # [V]
    target_ptr: Tensor  # [N]
    order_ptr: Tensor | None  # [N], labelled rows first; None where rows are taken as they come
    count_ptr: Tensor | None  # [1], how many rows of order are labelled
    V: int
    inverse_temperature: float
    softcap: float | None
    label_smoothing: float | None
    z_loss: float | None
    eps: float

    @staticmethod
    def of(
        given: Inputs | LogitRows, order: Tensor | None, count: Tensor | None, vocabulary: int
    ) -> Call:
        settings = given.settings
        return Call(
            given.bias,
            given.target,
            order,
            count,
            vocabulary,
            1.0 / settings.temperature,
            settings.softcap,
            settings.label_smoothing or None,
            settings.z_loss or None,
            settings.eps,
        )


class Operands(NamedTuple):
    """The operands of the products, which kernels take as one argument."""

    hidden_ptr: Tensor  # [N, D]
    weight_ptr: Tensor  # [V, D]
    stride_hn: int
    stride_wv: int


@dataclass(frozen=True)
class Splits:
    """Programs of a pass over all logits: a block of rows and a part of the vocabulary each."""

    tile: Tile
    row_blocks: int
    count: int
    tiles: int  # of each split; the last may have fewer


def splits_of(inputs: Inputs, rows: int) -> Splits:
    """How ``rows`` rows and the vocabulary are shared out among programs."""
    tile = tile_for(inputs.call, inputs.hidden, inputs.weight)
    row_blocks = triton.cdiv(rows, tile.block_n)
    tiles = triton.cdiv(inputs.shape[1], tile.block_v)
    each = triton.cdiv(tiles, splits_for(row_blocks, tiles, inputs.hidden))
    return Splits(tile, row_blocks, triton.cdiv(tiles, each), each)


def call_of(inputs: Inputs) -> Call:
    """The argument of kernels over the rows of a call."""
    return Call.of(inputs, inputs.rows.order, inputs.rows.count, inputs.shape[1])


def arguments_of(inputs: Inputs) -> dict[str, Any]:
    """The arguments that every kernel that makes logits takes."""
    hidden, weight = inputs.hidden, inputs.weight
    return {
        "call": call_of(inputs),
        "x": Operands(hidden, weight, hidden.stride(0), weight.stride(0)),
        "D": hidden.shape[1],
        "OPERAND": triton_dtype(inputs.call.operand),
    }


def tile_arguments(inputs: Inputs, tile: Tile) -> dict[str, Any]:
    """The arguments that every kernel that makes logits in tiles takes."""
    precision = precision_for(inputs.call.operand)
    return arguments_of(inputs) | tile.constants() | {"PRECISION": precision}


class RowResults(NamedTuple):
    """Results of rows, ``[N]`` each; ``None`` for a statistic that is not wanted."""

    loss_ptr: Tensor
    nll_ptr: Tensor
    lse_ptr: Tensor
    lse_low_ptr: Tensor | None
    entropy_ptr: Tensor | None
    correct_ptr: Tensor | None

    @staticmethod
    def of(results: dict[str, Tensor]) -> RowResults:
        loss, nll, lse, *statistics = (results[name] for name in ROW_RESULTS)
        return RowResults(loss, nll, lse, *(x if x.numel() else None for x in statistics))

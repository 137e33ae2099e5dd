"""Tile sizes, and what else is decided before a launch.

Every entry of ``SHIPPED`` is compiled and judged without a GPU by ``python -m benchmarks static``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from bft_kernels.config import CoreConfig


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """A tile of logits and how it is computed."""

    block_n: int
    block_v: int  # a multiple of 64
    block_d: int
    group: int  # row blocks side by side
    num_warps: int
    num_stages: int
    registers: int | None = None  # that a thread may have, where the compiler would take too few

    def constants(self) -> dict[str, int]:
        """Arguments of a launch."""
        options = {} if self.registers is None else {"maxnreg": self.registers}
        return options | {
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By compute capability (from this one on) and bytes of an operand. Chosen by what the compiler
# makes of them: no form of any kernel spills registers; see `python -m benchmarks static`.
SHIPPED = {
    (80, 2): Tile(128, 128, 32, 8, 8, 4),
    (80, 4): Tile(64, 64, 32, 8, 4, 3),
    (90, 2): Tile(128, 128, 64, 8, 8, 3),
    (90, 4): Tile(64, 64, 32, 8, 4, 3),
    (100, 2): Tile(128, 128, 32, 8, 8, 5),
    (100, 4): Tile(64, 64, 32, 8, 4, 3),
}
# With a softcap, where that is too much for the registers.
CAPPED = {
    (80, 2): Tile(64, 64, 32, 8, 4, 4, registers=200),
    (80, 4): Tile(32, 64, 32, 8, 4, 3),
    (100, 2): Tile(128, 64, 64, 8, 8, 4),
    (100, 4): Tile(32, 64, 32, 8, 4, 3),
}
# Of the two products with dy, by bytes of an operand: dH [block_n, block_d] over columns, and
# dW [block_v, block_d] over rows.
HIDDEN_PRODUCT = {2: Tile(128, 64, 128, 1, 8, 3), 4: Tile(64, 32, 64, 1, 4, 3)}
WEIGHT_PRODUCT = {2: Tile(64, 128, 128, 1, 8, 3), 4: Tile(32, 64, 64, 1, 4, 3)}
# Rows whose length is no multiple of 16 elements are loaded an element or two at a time, which
# takes more registers.
UNALIGNED = Tile(64, 64, 32, 8, 4, 2)
# Small enough that tests have many of them.
INTERPRETED = Tile(16, 64, 16, 2, 1, 1)


def tile_for(config: CoreConfig, width: int) -> Tile:
    """The tile for a call's products, of rows of ``width`` elements, on the current device."""
    if interpreted():
        return INTERPRETED
    if width % 16:
        return UNALIGNED
    arch = triton.runtime.driver.active.get_current_target().arch
    # AMD's names are strings; its compiler takes the first tile.
    known = [capability for capability, _ in SHIPPED]
    capability = max([c for c in known if isinstance(arch, int) and c <= arch], default=min(known))
    key = capability, config.operand_dtype.itemsize
    return CAPPED[key] if config.softcap is not None and key in CAPPED else SHIPPED[key]


def product_tiles(operand: torch.dtype, width: int) -> tuple[Tile, Tile]:
    """The tiles of ``dH`` and ``dW``."""
    if interpreted():
        return INTERPRETED, INTERPRETED
    if width % 16:
        return UNALIGNED, UNALIGNED
    return HIDDEN_PRODUCT[operand.itemsize], WEIGHT_PRODUCT[operand.itemsize]


def precision_for(operand: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products keep float32's accuracy."""
    if operand != torch.float32 or interpreted():
        return "ieee"
    return "ieee" if torch.version.hip else "tf32x3"


def triton_dtype(dtype: torch.dtype) -> triton.language.dtype:
    """The name of a type inside kernels."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def processors(x: Tensor) -> int:
    """Multiprocessors of the device ``x`` is on."""
    if x.device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def splits_for(row_blocks: int, tiles: int, x: Tensor) -> int:
    """Into how many parts the vocabulary is cut: enough for four waves, and no more than tiles."""
    wanted = -(-4 * processors(x) // max(1, row_blocks))
    return max(1, min(wanted, tiles))


def rows_contiguous(x: Tensor) -> Tensor:
    """``x [n, D]`` with ``stride(1) == 1``; a copy if it is not so."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous()

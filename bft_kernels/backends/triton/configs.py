"""Tile sizes and the other choices that are made before a launch.

Every entry of ``SHIPPED`` is compiled and judged without a GPU by ``python -m benchmarks static``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from bft_kernels.backends.common.tensors import processors
from bft_kernels.problem import Problem


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """The shape of a tile of logits, and the warps and stages that compute it."""

    block_n: int
    block_v: int  # a multiple of 64
    block_d: int
    group: int  # row blocks (for dW blocks of columns) that run side by side
    num_warps: int
    num_stages: int
    registers: int | None = None  # a thread's limit, where the compiler's own is too low

    def constants(self) -> dict[str, int]:
        """Arguments of a launch."""
        return at_most_registers(self.registers) | {
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kind of operands on one kind of GPU."""

    logits: Tile
    capped: Tile  # logits with a softcap, which takes more registers
    hidden: Tile  # dH [block_n, block_d], over columns
    weight: Tile  # dW [block_v, block_d], over rows


# Bytes of an element of the wider stored operand, and of the products' operands. Where float32
# tensors are rounded to a narrow type (autocast), tiles are loaded wide and take twice the room.
NARROW, MIXED, WIDE = (2, 2), (4, 2), (4, 4)
AMD = "amd"  # the family of all of AMD's processors, whatever their name
_PRODUCTS = Tile(128, 64, 128, 1, 8, 3), Tile(64, 128, 128, 8, 8, 3)
_MIXED_PRODUCTS = Tile(128, 32, 128, 1, 8, 3), Tile(32, 128, 128, 8, 8, 3)
_WIDE_PRODUCTS = Tile(64, 32, 64, 1, 4, 3), Tile(32, 64, 64, 8, 4, 3)
# Float32 operands: for mma.sync, and for the asynchronous instructions that came after it.
_WIDE = Tiles(Tile(64, 64, 16, 8, 4, 4, registers=255), Tile(32, 64, 32, 8, 4, 3), *_WIDE_PRODUCTS)
_WIDE_ASYNC = Tiles(Tile(64, 64, 32, 8, 4, 3), Tile(32, 64, 32, 8, 4, 3), *_WIDE_PRODUCTS)
# The key is the lowest compute capability that takes the entry, and the bytes above. No form of any
# kernel spills registers with these tiles; see `python -m benchmarks static`. 86, 89 and 120 have
# 99 KiB of shared memory a program, less than 80.
SHIPPED: dict[tuple[int | str, tuple[int, int]], Tiles] = {
    (80, NARROW): Tiles(
        Tile(128, 128, 32, 8, 8, 4), Tile(64, 64, 32, 8, 4, 4, registers=200), *_PRODUCTS
    ),
    (80, MIXED): Tiles(Tile(128, 64, 32, 8, 8, 3), Tile(64, 64, 32, 8, 4, 3), *_MIXED_PRODUCTS),
    (80, WIDE): _WIDE,
    (86, NARROW): Tiles(
        Tile(128, 64, 32, 8, 4, 4), Tile(64, 64, 32, 8, 4, 4, registers=200), *_PRODUCTS
    ),
    (86, MIXED): Tiles(
        Tile(128, 64, 32, 8, 8, 3), Tile(64, 64, 32, 8, 4, 3, registers=224), *_MIXED_PRODUCTS
    ),
    (86, WIDE): _WIDE,
    (90, NARROW): Tiles(Tile(128, 128, 64, 8, 8, 3), Tile(128, 128, 64, 8, 8, 3), *_PRODUCTS),
    (90, MIXED): Tiles(Tile(128, 128, 32, 8, 8, 3), Tile(128, 64, 32, 8, 4, 3), *_MIXED_PRODUCTS),
    (90, WIDE): _WIDE_ASYNC,
    (100, NARROW): Tiles(Tile(128, 128, 64, 8, 8, 3), Tile(128, 64, 64, 8, 8, 4), *_PRODUCTS),
    (100, MIXED): Tiles(
        Tile(128, 128, 64, 8, 8, 2, registers=255), Tile(128, 64, 32, 8, 4, 3), *_MIXED_PRODUCTS
    ),
    (100, WIDE): _WIDE_ASYNC,
    (120, NARROW): Tiles(Tile(128, 64, 32, 8, 4, 4), Tile(128, 64, 32, 8, 8, 3), *_PRODUCTS),
    (120, MIXED): Tiles(Tile(128, 64, 32, 8, 8, 3), Tile(128, 64, 32, 8, 8, 2), *_MIXED_PRODUCTS),
    (120, WIDE): _WIDE,
    (AMD, NARROW): Tiles(
        Tile(128, 128, 32, 8, 8, 2),
        Tile(128, 64, 32, 8, 8, 2),
        Tile(128, 32, 128, 1, 8, 2),
        Tile(32, 128, 128, 8, 8, 2),
    ),
    (AMD, MIXED): Tiles(
        Tile(128, 64, 32, 8, 8, 2),
        Tile(64, 64, 32, 8, 4, 2),
        Tile(64, 32, 64, 1, 4, 2),
        Tile(32, 64, 64, 8, 4, 2),
    ),
    (AMD, WIDE): Tiles(
        Tile(64, 64, 32, 8, 4, 2),
        Tile(64, 64, 32, 8, 4, 2),
        Tile(64, 32, 64, 1, 4, 2),
        Tile(32, 64, 64, 8, 4, 2),
    ),
}
# Rows whose length is no multiple of 16 elements are loaded an element or two at a time, which
# takes more registers. The key is the bytes of an element.
UNALIGNED, WIDE_UNALIGNED = Tile(64, 64, 32, 8, 4, 2), Tile(32, 64, 16, 8, 4, 2, registers=255)
_UNALIGNED = {2: UNALIGNED, 4: WIDE_UNALIGNED}
# It is so small that tests have many tiles.
INTERPRETED = Tile(16, 64, 16, 2, 1, 1)


def target() -> tuple[str, int | str]:
    """``cuda`` and the compute capability, or ``hip`` and the processor's name."""
    if interpreted():
        return "interpreter", ""
    current = triton.runtime.driver.active.get_current_target()
    return current.backend, current.arch


def at_most_registers(limit: int | None) -> dict[str, int]:
    """The launch option that bounds the registers of a thread; AMD's compiler has none."""
    return {} if limit is None or target()[0] != "cuda" else {"maxnreg": limit}


def loop_stages() -> int:
    """Stages of a loop without a product: 1 on AMD, which has no asynchronous copies."""
    return 3 if target()[0] == "cuda" else 1


def has_whole_words(operand: torch.dtype) -> bool:
    """Whether a thread has 32 adjacent columns of a product, as in sm_100's tensor memory.

    In the interpreter the type decides, so that tests run both ways.
    """
    _, arch = ("cuda", 100) if interpreted() else target()
    return operand.itemsize == 2 and isinstance(arch, int) and 100 <= arch < 120


def _shipped(operand: torch.dtype, *stored: torch.dtype) -> Tiles:
    """The entry of the current device for operands kept as ``stored``."""
    _, arch = target()
    family: int | str = AMD
    if isinstance(arch, int):
        known = [first for first, _ in SHIPPED if isinstance(first, int)]
        family = max([first for first in known if first <= arch], default=min(known))
    return SHIPPED[family, (_widest(operand, *stored), operand.itemsize)]


def _widest(*dtypes: torch.dtype) -> int:
    """Bytes per element of the widest type."""
    return max(dtype.itemsize for dtype in dtypes)


def tile_for(call: Problem, hidden: Tensor, weight: Tensor) -> Tile:
    """The tile of logits for a call's operands, on the current device."""
    if interpreted():
        return INTERPRETED
    if hidden.shape[1] % 16:
        return _UNALIGNED[_widest(call.operand, hidden.dtype, weight.dtype)]
    tiles = _shipped(call.operand, hidden.dtype, weight.dtype)
    return tiles.logits if call.settings.softcap is None else tiles.capped


def product_tiles(operand: torch.dtype, hidden: Tensor, weight: Tensor) -> tuple[Tile, Tile]:
    """The tiles of ``dH``, whose products read ``weight``, and of ``dW``, which read ``hidden``."""
    if interpreted():
        return INTERPRETED, INTERPRETED
    if hidden.shape[1] % 16:
        return _UNALIGNED[_widest(operand, weight.dtype)], _UNALIGNED[
            _widest(operand, hidden.dtype)
        ]
    return _shipped(operand, weight.dtype).hidden, _shipped(operand, hidden.dtype).weight


def precision_for(operand: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products keep float32's accuracy."""
    if operand != torch.float32 or interpreted():
        return "ieee"
    return "ieee" if target()[0] == "hip" else "tf32x3"


def triton_dtype(dtype: torch.dtype) -> triton.language.dtype:
    """The type inside kernels for a type of torch."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def splits_for(row_blocks: int, tiles: int, x: Tensor) -> int:
    """The number of parts of the vocabulary: enough for four waves, and at most one a tile."""
    wanted = -(-4 * processors(x.device) // max(1, row_blocks))
    return max(1, min(wanted, tiles))

"""Kernels as the model sees them: work of each kind, and the time that the scarcest takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.model_hardware import EMPTY_PROGRAM, LAUNCH, PORT, Gpu
from benchmarks.shapes import Shape

# Tiles of the vendor's products, rows and columns.
VENDOR_TILES = ((256, 128), (128, 256), (128, 128), (64, 128))


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel, or of several alike.

    One program does one thing after the other: its products, its other instructions, waiting for
    loads. Only another program on the same multiprocessor overlaps them::

        time = max(tensor, issue, (tensor + issue + wait) / resident, memory / bandwidth,
                   cache / cache_bandwidth) + launches * LAUNCH
    """

    name: str
    tensor: float = 0.0  # seconds at the kernel's rate, tiles and waves filled up
    issue: float = 0.0  # seconds to issue the instructions outside the products' loop
    wait: float = 0.0  # seconds of waiting for loads, a multiprocessor's programs in a row
    resident: int = 1 << 30  # programs of a multiprocessor that overlap; many: a plain roofline
    memory: float = 0.0  # bytes
    cache: float = 0.0  # bytes from the second-level cache
    launches: int = 1

    def seconds(self, gpu: Gpu) -> float:
        """Time on ``gpu``."""
        one_at_a_time = self.tensor + self.issue + self.wait
        busy = max(self.tensor, self.issue, one_at_a_time / self.resident)
        moved = max(self.memory / gpu.bandwidth, self.cache / gpu.cache_bandwidth)
        return max(busy, moved) + self.launches * LAUNCH

    def times(self, count: float) -> Kernel:
        """``count`` of them, one after the other."""
        return replace(
            self,
            tensor=self.tensor * count,
            issue=self.issue * count,
            wait=self.wait * count,
            memory=self.memory * count,
            cache=self.cache * count,
            launches=round(self.launches * count),
        )


def total(kernels: Iterable[Kernel], gpu: Gpu) -> float:
    """Seconds of ``kernels``, one after the other."""
    return sum(kernel.seconds(gpu) for kernel in kernels)


def g_seconds(shape: Shape, gpu: Gpu) -> float:
    """1G at the vendor's rate: ``2 N V D / rate``."""
    return shape.flops / gpu.vendor


def waves(programs: int, gpu: Gpu) -> float:
    """By how much ``programs`` of the same length leave multiprocessors idle at the end; from 1.

    A multiprocessor that holds two programs runs each at half of its speed, so only what a
    multiprocessor gets in all counts.
    """
    return math.ceil(programs / gpu.processors) / (programs / gpu.processors)


def product(
    name: str, m: int, n: int, k: int, gpu: Gpu, *, out: int = 2, accumulates: bool = False
) -> Kernel:
    """The vendor's product ``[m, k] @ [k, n]`` of 2-byte operands, with the best of its tiles.

    Tiles are filled up and so are waves of them; ``k`` is not split. A small tile is held up by
    its operands, ``2 (rows + columns / cluster)`` bytes for each ``k`` through ``PORT``.

    Args:
        name: of the kernel.
        m, n, k: sizes.
        gpu: whose rate it has.
        out: bytes of a result.
        accumulates: whether the result is added to.
    """
    best = math.inf
    for rows, columns in VENDOR_TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        operands = 2 * (min(rows, columns) + max(rows, columns) / gpu.cluster)
        cycles = max(rows * columns / gpu.multiply_adds, operands / PORT)
        flops = tiles * 2 * gpu.multiply_adds * cycles * k
        best = min(best, flops * waves(tiles, gpu) / gpu.vendor)
    moved = 2 * (m * k + k * n) + out * m * n * (1 + accumulates)
    return Kernel(name, tensor=best, memory=moved)


def triton_product(
    name: str,
    programs: int,
    tiles: int,
    block: tuple[int, int],
    k: int,
    slots: float,
    warps: int,
    resident: int,
    gpu: Gpu,
    memory: float,
) -> Kernel:
    """A Triton kernel that makes tiles of a product, and does more with each.

    Args:
        name: of the kernel.
        programs: that share the ``tiles``.
        tiles: of the product, ``block`` rows and columns each, over ``k``.
        block: rows and columns.
        k: length of the sums.
        slots: instructions outside the products' loop, of a warp and tile.
        warps: of a program.
        resident: programs of a multiprocessor.
        gpu: whose rates it has.
        memory: bytes.
    """
    idle = waves(programs, gpu)
    flops = tiles * 2 * block[0] * block[1] * k
    return Kernel(
        name,
        tensor=flops / (gpu.vendor * gpu.triton) * idle,
        issue=tiles * slots * warps / gpu.issue * idle,
        resident=resident,
        memory=memory,
    )


def elementwise(name: str, elements: float, read: float, written: float) -> Kernel:
    """A pass over ``elements``: so many bytes of each read and written."""
    return Kernel(name, memory=elements * (read + written))


def held(elements: float, itemsize: int, gpu: Gpu) -> bool:
    """Whether the second-level cache keeps a tensor from the pass that wrote it to the next."""
    return elements * itemsize <= gpu.cache / 2


def row_pass(name: str, rows: int, columns: int, read: float, written: float, gpu: Gpu) -> Kernel:
    """A pass over rows of a chunk of logits, from the cache where the chunk fits it."""
    moved = rows * columns * (read + written)
    if held(rows * columns, 4, gpu):
        return Kernel(name, cache=moved)
    return Kernel(name, memory=moved)


def empty_programs(name: str, programs: float, resident: int, gpu: Gpu) -> Kernel:
    """Programs that return as soon as they know that there is nothing to do."""
    return Kernel(
        name, wait=programs * EMPTY_PROGRAM / gpu.processors, resident=resident, launches=0
    )

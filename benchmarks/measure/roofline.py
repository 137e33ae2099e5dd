"""What GPUs can do at most, and the operations and bytes of each loss.

A kernel takes the time of its products, at the rate that the vendor's library reaches, or that of
its bytes, at the rate that a copy reaches, whichever is longer; and a launch. Kernels follow one
another. Nothing here is measured. What else kernels do (instructions, waits) only adds to it:
docs/dev/gpu-model.md says how far above it the times are that peers published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from benchmarks.shapes import Shape
from bft_kernels.backends.common.chunked import plan_rows
from bft_kernels.problem import ACCELERATOR_BUFFER_BYTES

# Bytes of an element; float32 products are TF32's.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
# The part of the peak that three products of N 8192, D 4096, V 151,936 reach on an H100: 42 ms are
# published (huggingface/trl#6858). The same part is assumed for other GPUs and types.
PRODUCTS = 3 * 2 * 8192 * 4096 * 151_936 / 42e-3 / 989.4e12
BANDWIDTH = 0.9  # the part of the memory's peak that a pass over large tensors reaches
LAUNCH = 3e-6  # seconds from the start of one kernel to that of the next, with a full queue


@dataclass(frozen=True)
class Gpu:
    """Peaks by the vendor's datasheet: dense operations, and bytes of memory, a second."""

    operations: Mapping[str, float]  # by type of the operands
    memory: float


def _gpu(memory: float, tf32: float, half: float, eight: float, *eights: str) -> Gpu:
    """A GPU, from its operations a second in units of 10^12."""
    rates = {"float32": tf32, "bfloat16": half, "float16": half} | dict.fromkeys(eights, eight)
    return Gpu({name: rate * 1e12 for name, rate in rates.items()}, memory)


# A100 and H100 are the SXM ones with 80 GB, B200 is that of HGX.
GPUS = {
    "A100": _gpu(2.039e12, 156, 312, 624, "int8"),
    "H100": _gpu(3.35e12, 494.7, 989.4, 1978.9, "int8", "fp8"),
    "H200": _gpu(4.8e12, 494.7, 989.4, 1978.9, "int8", "fp8"),
    "B200": _gpu(8e12, 1100, 2250, 4500, "int8", "fp8"),
}
# Entries a token that the sampled gradient keeps on PubMed abstracts, by eps: the most of three
# models (docs/dev/gpu-model.md).
KEPT = {2**-8: 69.0, 2**-10: 180.0, 2**-12: 446.0}
# Columns of the sampled dW that take a dense product, and bytes that sorting moves for an entry.
DENSE, SORT_BYTES = 256, 170


@dataclass(frozen=True)
class Work:
    """One kernel, or several of one kind."""

    name: str
    operations: float = 0.0
    bytes: float = 0.0
    operand: str = "bfloat16"  # of the products
    launches: int = 1

    def seconds(self, gpu: Gpu) -> float:
        """The longer of the two times, and the launches."""
        busy = self.operations / (PRODUCTS * gpu.operations[self.operand])
        return max(busy, self.bytes / (BANDWIDTH * gpu.memory)) + self.launches * LAUNCH


def seconds(works: Iterable[Work], gpu: Gpu) -> float:
    """The time of kernels that follow one another."""
    return sum(work.seconds(gpu) for work in works)


def product(
    name: str, m: int, n: int, k: int, operand: str, *, out: int = 4, adds: bool = False
) -> Work:
    """``[m, k] @ [k, n]``, with each element of operands and result moved once.

    ``out`` is the bytes of an element of the result, which is read too if the product ``adds``.
    """
    moved = ITEMSIZE[operand] * (m * k + k * n) + out * m * n * (1 + adds)
    return Work(name, 2 * m * n * k, moved, operand)


def chunks(shape: Shape, budget: int) -> list[int]:
    """The rows of each chunk of float32 logits that fits into ``budget`` bytes."""
    sizes = shape.tokens, shape.vocabulary, shape.width, 4, budget
    rows = plan_rows(*sizes, widen=False).chunk_rows
    full, rest = divmod(shape.tokens, rows)
    return [rows] * full + [rest] * (rest > 0)


def exact(
    shape: Shape,
    mode: str = "both",
    operand: str = "bfloat16",
    budget: int = ACCELERATOR_BUFFER_BYTES,
) -> list[Work]:
    """A weighted or plain loss and its gradient, chunk by chunk: 1G, 2G or 3G by ``mode``.

    Logits stay float32. One pass reads them for the loss, and one puts ``dy`` in their place.
    Products add to ``dW`` in float32, which is rounded at the end.
    """
    size, launches, works = ITEMSIZE[operand], 1 if mode == "forward" else 12, []
    for i, rows in enumerate(chunks(shape, budget)):
        passes = Work("loss", bytes=4, launches=launches), Work("dy", bytes=4 + size)
        works += _chunk(shape, rows, mode, operand, passes, out=4, adds=i > 0)
    if mode == "both":
        works.append(Work("dW rounded", bytes=(4 + size) * shape.vocabulary * shape.width))
    return works


def eager(shape: Shape, mode: str = "both", operand: str = "bfloat16") -> list[Work]:
    """All logits at once: passes that widen them, those of log_softmax, and the reverse of both."""
    size = ITEMSIZE[operand]
    loss = Work("loss", bytes=size + 4 + 8, launches=3)
    dy = Work("dy", bytes=4 + 12 + 4 + size, launches=3)
    return _chunk(shape, shape.tokens, mode, operand, (loss, dy), out=size)


def _chunk(
    shape: Shape,
    rows: int,
    mode: str,
    operand: str,
    passes: tuple[Work, Work],  # for the loss and for dy, with the bytes of one logit
    **how: int,  # of the products that are made
) -> list[Work]:
    width, vocabulary = shape.width, shape.vocabulary
    loss, dy = (replace(one, bytes=one.bytes * rows * vocabulary) for one in passes)
    works = [product("logits", rows, vocabulary, width, operand, out=how["out"]), loss]
    if mode != "forward":
        works += [dy, product("dH", rows, width, vocabulary, operand, out=how["out"])]
    if mode == "both":
        works.append(product("dW", vocabulary, width, rows, operand, **how))
    return works


def sampled(
    shape: Shape,
    kept: float,  # entries a token, as in ``KEPT``
    mode: str = "both",
    operand: str = "bfloat16",
    budget: int = ACCELERATOR_BUFFER_BYTES,  # of logits and of one bit for each
    hits: float = 0.0,  # the part of the gathered rows that a cache supplies
) -> list[Work]:
    """The loss and its sampled gradient: 1G, and gathered rows of ``weight`` and ``hidden``."""
    size, tokens, width = ITEMSIZE[operand], shape.tokens, shape.width
    works = exact(shape, "forward", operand, budget * 32 // 33)
    bits = tokens * shape.vocabulary / 8
    entries = tokens * kept
    works.append(Work("bits", bytes=4 * bits + 40 * entries, launches=4))
    rows = size * width * entries * (1 - hits)
    if mode != "forward":
        works.append(Work("dH", 2 * width * entries, rows + size * tokens * width, operand))
    if mode == "both":
        moved = rows + size * shape.vocabulary * width
        works += [
            Work("sort by column", bytes=SORT_BYTES * entries, launches=30),
            Work("dW", 2 * width * entries, moved, operand),
            product("dense dW", min(DENSE, shape.vocabulary), width, tokens, operand),
        ]
    return works


def times_g(works: Iterable[Work], shape: Shape, gpu: Gpu, operand: str = "bfloat16") -> float:
    """The seconds over those of the operations of 1G alone."""
    return seconds(works, gpu) / Work("1G", shape.flops, 0, operand, launches=0).seconds(gpu)

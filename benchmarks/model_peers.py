"""What peers published, and what the same model makes of their algorithms.

Each algorithm is read from the peer's source. None has a constant of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.model_hardware import GPUS, Gpu
from benchmarks.model_kernels import (
    Kernel,
    elementwise,
    held,
    product,
    row_pass,
    total,
    triton_product,
)
from benchmarks.model_static import Compiled, compiled
from benchmarks.shapes import Shape

Algorithm = Callable[[Shape, Gpu], list[Kernel]]


def _chunks(shape: Shape, rows: int) -> list[int]:
    """Tokens of each chunk."""
    full, rest = divmod(shape.tokens, rows)
    return [rows] * full + [rest] * (rest > 0)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _logits(rows: int, shape: Shape, gpu: Gpu, out: int = 2) -> Kernel:
    return product("logits", rows, shape.vocabulary, shape.width, gpu, out=out)


def _grad_hidden(rows: int, shape: Shape, gpu: Gpu) -> Kernel:
    return product("dH", rows, shape.width, shape.vocabulary, gpu)


def _grad_weight(rows: int, shape: Shape, gpu: Gpu, out: int = 2, add: bool = False) -> Kernel:
    name = "dW"
    return product(name, shape.vocabulary, shape.width, rows, gpu, out=out, accumulates=add)


def bare(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """The three products, all rows at once."""
    rows = shape.tokens
    return [
        _logits(rows, shape, gpu),
        _grad_hidden(rows, shape, gpu),
        _grad_weight(rows, shape, gpu),
    ]


def softmax_bytes(rows: int, columns: int, gpu: Gpu) -> tuple[float, float]:
    """Bytes an element of torch's float32 log_softmax, forward and backward.

    It goes three times over a row, for maximum, sum and result, and backward twice over gradient
    and result; two rows of a multiprocessor at a time. Where those exceed the cache each pass comes
    from memory.
    """
    if held(min(rows, 2 * gpu.processors) * columns, 4, gpu):
        return 4 + 4, 8 + 4
    return 3 * 4 + 4, 2 * 8 + 4


def eager(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Logits, widened to float32 as Hugging Face's loss does, log_softmax, and back."""
    elements = shape.tokens * shape.vocabulary
    forward, backward = softmax_bytes(shape.tokens, shape.vocabulary, gpu)
    return [
        *bare(shape, gpu),
        elementwise("widen", elements, 2, 4),
        elementwise("log_softmax", elements, forward, 0),
        elementwise("nll backward", elements, 0, 4),
        elementwise("log_softmax backward", elements, backward, 0),
        elementwise("narrow", elements, 4, 2),
    ]


def liger(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Chunks of about ``N D / V`` rows, up to a power of two; ``dW`` through two temporaries.

    ``grad_weight += mm(dy.T, x).float()`` for a bfloat16 ``grad_weight``, as it was when the
    figures were published: a ``V x D`` product, a float32 copy of it, a sum.
    """
    rows = _power_of_two(math.ceil(shape.tokens / math.ceil(shape.vocabulary / shape.width)))
    kernels = []
    for chunk in _chunks(shape, min(rows, shape.tokens)):
        kernels += [
            _logits(chunk, shape, gpu),
            # Its Triton kernel reads a row for the sum, again for the gradient, and writes it.
            row_pass("cross entropy", chunk, shape.vocabulary, 4, 2, gpu),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu),
            elementwise("dW to float32", shape.vocabulary * shape.width, 2, 4),
            elementwise("dW sum", shape.vocabulary * shape.width, 2 + 4, 2),
        ]
    return kernels


def _one_pass(shape: Shape, gpu: Gpu, rows: int, wide: bool) -> list[Kernel]:
    """3G over chunks whose gradient replaces their logits in one read; ``dW`` added in place."""
    kernels = []
    for i, chunk in enumerate(_chunks(shape, min(rows, shape.tokens))):
        kernels += [
            _logits(chunk, shape, gpu),
            row_pass("cross entropy", chunk, shape.vocabulary, 2, 2, gpu),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu, out=4 if wide else 2, add=i > 0),
        ]
    return kernels


def liger_cute_hopper(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """All rows at once, logits overwritten by their gradient."""
    return _one_pass(shape, gpu, shape.tokens, wide=False)


def liger_cute_blackwell(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Chunks of a quarter of the rows, 512 to 1024."""
    return _one_pass(shape, gpu, max(512, min(1024, shape.tokens // 4)), wide=False)


def quack(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Chunks of 4096 rows, ``dW`` in float32 until the last of them."""
    return _one_pass(shape, gpu, 4096, wide=True)


def scaled_forward(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Liger's scaled loss, forward: a product whose softmax a warp group of its own overlaps."""
    kernel = product("forward", shape.tokens, shape.vocabulary, shape.width, gpu, out=0)
    return [kernel]


def scaled(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """And backward in waves of 1024 rows: logits again, then both products."""
    kernels = scaled_forward(shape, gpu)
    for i, chunk in enumerate(_chunks(shape, 1024)):
        kernels += [
            _logits(chunk, shape, gpu),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu, add=i > 0),
        ]
    return kernels


def scaled_cutile(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Both ways in chunks of 256 MiB of bfloat16 logits from the vendor's product."""
    rows = 256 * 2**20 // (2 * shape.vocabulary)
    kernels = []
    for i, chunk in enumerate(_chunks(shape, rows)):
        kernels += [
            _logits(chunk, shape, gpu),
            row_pass("forward", chunk, shape.vocabulary, 2, 0, gpu),
            _logits(chunk, shape, gpu),
            row_pass("backward", chunk, shape.vocabulary, 2, 2, gpu),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu, add=i > 0),
        ]
    return kernels


def verl(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Liger's fallback in plain torch after verl: 512 rows at a time, entropy always."""
    kernels = []
    for chunk in _chunks(shape, 512):
        softmax, _ = softmax_bytes(chunk, shape.vocabulary, gpu)
        elements = chunk * shape.vocabulary
        # Scaling, widening, softmax, logsumexp (maximum, difference, exp, sum), product with the
        # logits and its sum, log_softmax.
        forward = 4 + 6 + softmax + (4 + 8 + 8 + 4) + 12 + 4 + softmax
        # Scaling, widening, softmax, two zero fills, one-hot less p, scaling, sum, narrowing,
        # scaling.
        backward = 4 + 6 + softmax + 4 + 4 + 12 + 8 + 12 + 6 + 4
        kernels += [
            _logits(chunk, shape, gpu),
            Kernel("forward passes", memory=elements * forward, launches=12),
            _logits(chunk, shape, gpu),
            Kernel("backward passes", memory=elements * backward, launches=12),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu),
            elementwise("dW sum", shape.vocabulary * shape.width, 4, 2),
        ]
    return kernels


def trl(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Checkpointed chunks of 256 rows: the forward twice, ``dW`` a temporary that autograd adds."""
    kernels = []
    for chunk in _chunks(shape, 256):
        forward, backward = softmax_bytes(chunk, shape.vocabulary, gpu)
        elements = chunk * shape.vocabulary
        once = [
            _logits(chunk, shape, gpu),
            Kernel("widen, log_softmax", memory=elements * (6 + forward), launches=3),
        ]
        kernels += [
            *once,
            *once,
            Kernel("backward passes", memory=elements * (4 + backward + 6), launches=3),
            _grad_hidden(chunk, shape, gpu),
            _grad_weight(chunk, shape, gpu),
            elementwise("dW sum", shape.vocabulary * shape.width, 4, 2),
        ]
    return kernels


# Blocks that its filter leaves, as the peer's own estimate of its backward has it.
CCE_UNFILTERED = 0.2


def cut_cross_entropy(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """A Triton forward, and a backward that forms logits again and skips most blocks.

    Tiles and warps are those of its defaults; slots are the compiler's. In the blocks that are left
    both products add to bfloat16 results tile by tile, under locks.
    """
    width, elements = shape.width, shape.tokens * shape.vocabulary
    operands = 2 * width * (shape.tokens + shape.vocabulary)
    forward, backward = (
        compiled(gpu.target, f"cce_{name}") for name in ("lse_forward", "backward")
    )

    def tiled(name: str, figures: Compiled, rows: int, columns: int, share: float) -> Kernel:
        tiles = elements // (rows * columns)
        return triton_product(
            name,
            tiles,
            tiles,
            (rows, columns),
            round(width * share),
            figures.slots,
            figures.warps,
            figures.resident,
            gpu,
            operands,
        )

    # A block that is left reads and adds two gradients [128, D]: read and write, twice.
    left = CCE_UNFILTERED * elements / (128 * 128) * 128 * width * 2 * 2 * 2
    return [
        tiled("forward", forward, 256, 128, 1),
        tiled("backward", backward, 128, 128, 1 + 2 * CCE_UNFILTERED),
        Kernel("gradients of blocks", cache=left, launches=0),
        elementwise("zero fill", (shape.tokens + shape.vocabulary) * width, 0, 2),
    ]


@dataclass(frozen=True)
class Published:
    """One published time, forward and backward unless the peer's name says otherwise."""

    peer: str
    gpu: str
    shape: Shape
    seconds: float
    algorithm: Algorithm
    calibrates: bool = False  # whether a constant of the model comes from this figure

    @property
    def narrow(self) -> bool:
        """Whether it takes 256 rows at a time at most, and a ``V x D`` temporary for each."""
        return self.algorithm in (liger, trl)

    def predicted(self) -> float:
        """Seconds by the model."""
        gpu = GPUS[self.gpu]
        return total(self.algorithm(self.shape, gpu), gpu)

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted() / self.seconds - 1


_SCALED, _TRL = Shape(8192, 4096, 131_072), Shape(8192, 4096, 151_936)
_CCE = Shape(16_384, 2048, 248_320)


def _llama(tokens: int) -> Shape:
    return Shape(tokens, 4096, 128_256)


# The authors' own figures: linkedin/Liger-Kernel#1334, #1339, #1356 and huggingface/trl#6858.
PUBLISHED = [
    Published("bare products", "H100", _TRL, 42e-3, bare, calibrates=True),
    Published("eager", "H100", _TRL, 59e-3, eager),
    Published("TRL chunked", "H100", _TRL, 167e-3, trl),
    Published("Liger Triton", "H100", _TRL, 192e-3, liger),
    Published("Liger scaled, forward", "H100", _SCALED, 12.25e-3, scaled_forward),
    Published("Liger scaled", "H100", _SCALED, 50.4e-3, scaled),
    Published("Liger scaled cuTile", "H100", _SCALED, 57.2e-3, scaled_cutile),
    Published("verl-style fallback", "H100", _SCALED, 128.8e-3, verl),
    Published("cut-cross-entropy", "H100", _CCE, 92.6e-3, cut_cross_entropy),
    Published("cut-cross-entropy", "H100", Shape(4096, 2048, 248_320), 23.18e-3, cut_cross_entropy),
    Published("Liger Triton", "H100", _CCE, 321e-3, liger),
    Published("Liger CuTe", "H200", _llama(8192), 34.4e-3, liger_cute_hopper),
    Published("QuACK", "H200", _llama(8192), 35.5e-3, quack),
    Published("QuACK", "H200", _llama(4096), 16.8e-3, quack),
    Published("QuACK", "H200", _llama(1024), 4.1e-3, quack),
    Published("Liger Triton", "H200", _llama(8192), 154.1e-3, liger),
    Published("Liger Triton", "H200", _llama(4096), 142.6e-3, liger),
    Published("Liger Triton", "H200", _llama(1024), 137.6e-3, liger),
    Published("Liger CuTe", "B200", _llama(8192), 17.51e-3, liger_cute_blackwell),
    Published("Liger CuTe", "B200", _llama(1024), 2.52e-3, liger_cute_blackwell),
    Published("Liger Triton", "B200", _llama(8192), 121.78e-3, liger),
    Published("Liger Triton", "B200", _llama(1024), 117.1e-3, liger),
]


def errors(published: Iterable[Published] = PUBLISHED, *, narrow: bool = False) -> list[float]:
    """Of the figures that no constant comes from, ascending; of one of the two kinds."""
    chosen = (figure for figure in published if figure.narrow == narrow)
    return sorted(figure.error for figure in chosen if not figure.calibrates)

"""Shapes of ``python -m benchmarks gpu``."""

from __future__ import annotations

from benchmarks.shapes import Shape

# In order of importance: when time runs out, the last ones are missing.
SHAPES = (
    Shape(8192, 4096, 131_072),
    Shape(8192, 4096, 151_936),
    Shape(4096, 4096, 128_256),
    Shape(16_384, 2048, 248_320),
    Shape(1024, 4096, 128_256),
)
# For the interpreter, which takes about a second for a step of this.
REHEARSAL = (Shape(8, 16, 64),)

_WORKSPACE = 2 * 2**30
_SMALLEST = 1024


def fit_to(shape: Shape, memory: int) -> Shape:
    """The shape, its tokens and vocabulary halved until a fused loss in 16 bits has room for it.

    Room is needed for inputs and gradients, a gradient of ``weight`` in float32 and 2 GiB.
    """

    def needed(shape: Shape) -> int:
        weight = shape.vocabulary * shape.width
        return 4 * (shape.tokens * shape.width + weight) + 4 * weight + _WORKSPACE

    while needed(shape) > memory and min(shape.tokens, shape.vocabulary) > _SMALLEST:
        shape = Shape(shape.tokens // 2, shape.width, shape.vocabulary // 2)
    return shape

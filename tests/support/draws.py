"""The draws of the sampled gradient, from their definition; the chance of an entry to be kept."""

import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
# A statistical test fails where chance alone would give a p-value this small. The suite computes
# well under a thousand of them, so that a correct program fails less than one run in a million.
P_VALUE = 1e-9

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def _mix64(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw_bits(seed, rows, columns):
    """The 32 bits behind each draw, from the definition in unsigned numpy arithmetic.

    ``seed`` is an int or an int64 array beside ``rows``; the result is uint32 ``[rows, columns]``.
    """
    seeds = np.atleast_1d(np.asarray(seed, dtype=np.int64)).view(np.uint64)
    rows = np.asarray(rows, dtype=np.int64).view(np.uint64)
    key = _mix64(_mix64(seeds + _GOLDEN_RATIO) + _GOLDEN_RATIO * rows)
    multiplier = (key >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offset = (key & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    x = multiplier[:, None] * np.asarray(columns).astype(np.uint32) + offset[:, None]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x


def region_bits(seed, row, rows, column, columns):
    """:func:`draw_bits` of a region."""
    return draw_bits(seed, [row + i for i in range(rows)], [column + j for j in range(columns)])


def uniform(bits):
    """What is drawn, of these bits."""
    return _values()[bits >> np.uint32(8)]


@cache
def _values():
    """All 2^24 values that ``u`` can take."""
    return (np.arange(2**24, dtype=np.float32) + np.float32(0.5)) * np.float32(2**-24)


def inclusion(p, eps):
    """The exact chance of ``u * eps < p``, from all values that ``u`` can take."""
    grid = _values() * np.float32(eps)  # never falls, so that a search counts
    kept = np.searchsorted(grid.astype(np.float64), p.double().numpy(), side="left")
    return torch.from_numpy(kept / 2**24)


class Program:
    """``draws.cpp``: what a compiler makes of ``csrc/sampling.h``."""

    def __init__(self, folder, *compiler):
        self.path = folder / "draws"
        source = ROOT / "tests/support/draws.cpp"
        flags = ["-std=c++17", "-O2", f"-I{ROOT}", "-o", self.path, source]
        subprocess.run([*compiler, *flags], check=True)

    def __call__(self, *region):
        """Bits and uniforms ``[rows, cols]`` of a region."""
        line = " ".join(map(str, region))
        done = subprocess.run([self.path], input=line.encode(), capture_output=True, check=True)
        shape = (2, region[2], region[4])
        both = np.frombuffer(done.stdout, np.uint32).reshape(shape)
        return both[0], both[1].view(np.float32)

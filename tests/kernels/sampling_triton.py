"""The sampling hash as a Triton device function; run as a program, it writes a block of bits and u.

A program of its own, because Triton decides when a kernel is decorated whether it is interpreted:

    TRITON_INTERPRET=1 python sampling_triton.py SEED ROW0 ROWS COL0 COLS OUT.npz
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def mix64(z):
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def mix32(x):
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def draw_bits(seed, rows, columns):
    """Bits [BLOCK_N, BLOCK_V] of uint64 rows [BLOCK_N] and uint32 columns [BLOCK_V]."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    key = mix64(mix64(seed + gamma) + gamma * rows)
    multiplier = (key >> 32).to(tl.uint32) | tl.full([], 1, tl.uint32)
    offset = key.to(tl.uint32)
    return mix32(multiplier[:, None] * columns[None, :] + offset[:, None])


@triton.jit
def draw_kernel(
    bits_ptr, u_ptr, seed_ptr, row0, rows, col0, cols, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    seed = tl.load(seed_ptr).to(tl.uint64)
    row = (row0 + offs_n.to(tl.int64)).to(tl.uint64)
    column = (col0 + offs_v.to(tl.int64)).to(tl.uint32)
    bits = draw_bits(seed, row, column)
    u = ((bits >> 8).to(tl.float32) + 0.5) * (2.0**-24)
    mask = (offs_n < rows)[:, None] & (offs_v < cols)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * cols + offs_v[None, :]
    tl.store(bits_ptr + offs, bits.to(tl.int32, bitcast=True), mask=mask)
    tl.store(u_ptr + offs, u, mask=mask)


def main(seed, row0, rows, col0, cols, path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = torch.zeros(rows, cols, dtype=torch.int32, device=device)
    u = torch.full((rows, cols), float("nan"), device=device)
    grid = (triton.cdiv(rows, 4), triton.cdiv(cols, 16))
    seed_tensor = torch.tensor([seed], device=device)
    draw_kernel[grid](bits, u, seed_tensor, row0, rows, col0, cols, BLOCK_N=4, BLOCK_V=16)
    np.savez(path, bits=bits.cpu().numpy().view(np.uint32), u=u.cpu().numpy())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), sys.argv[6])

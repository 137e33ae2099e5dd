"""The sampling hash of the Triton backend; run as a program, it writes a block of bits and u.

A program of its own, because Triton decides when a kernel is decorated whether it is interpreted:

    TRITON_INTERPRET=1 python tests/support/triton_draws.py SEED ROW0 ROWS COL0 COLS OUT.npz
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl

from bft_kernels.backends.triton.device import draw_bits, row_key, uniform


@triton.jit
def draw_kernel(
    bits_ptr, u_ptr, seed_ptr, row0, rows, col0, cols, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    multiplier, offset = row_key(tl.load(seed_ptr), row0 + offs_n.to(tl.int64))
    column = (col0 + offs_v.to(tl.int64)).to(tl.uint32)
    bits = draw_bits(multiplier[:, None], offset[:, None], column[None, :])
    u = uniform(bits)
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

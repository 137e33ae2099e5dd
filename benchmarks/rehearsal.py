"""Calls that between them use every form of every kernel, on tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.config import CoreConfig, Weighting
from bft_kernels.results import Saved, Wanted

# N, D and V of the published figures.
ROWS, WIDTH, VOCABULARY = 8192, 4096, 131_072


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _config(dtype: torch.dtype) -> CoreConfig:
    return CoreConfig(
        ignore_index=-100,
        softcap=None,
        temperature=1.0,
        label_smoothing=0.0,
        z_loss=0.0,
        eps=2**-10,
        residual="recompute",
        statistics=False,
        variance=False,
        hidden_variance=False,
        operand=str(dtype).removeprefix("torch."),
        backend="triton",
        max_buffer_bytes=512 * 2**20,
        check_values=False,
        check_finite=False,
    )


def ours(dtype: torch.dtype, *, width: int = WIDTH, transformed: bool = False) -> None:
    """Forward and backward of every mode; transformed: with a bias, a softcap and smoothing."""
    from bft_kernels.backends.triton import linear_nll, linear_nll_backward, weighted_loss

    hidden, weight = _empty(ROWS, width, dtype=dtype), _empty(VOCABULARY, width, dtype=dtype)
    target, seed = _empty(ROWS, dtype=torch.int64), _empty(dtype=torch.int64)
    bias = _empty(VOCABULARY, dtype=dtype) if transformed else None
    grad = _empty(ROWS)
    plain = _config(dtype)
    if transformed:
        plain = replace(plain, softcap=30.0, temperature=0.7)
    sampled = replace(plain, residual="entries")
    exact = plain
    if transformed:
        exact = replace(plain, label_smoothing=0.1, z_loss=1e-4)
    wanted = Wanted(hidden=True, weight=True, bias=transformed)
    inputs = (hidden, weight, target, bias)
    certified = {"statistics": True, "variance": True, "hidden_variance": True}
    for config in (exact, replace(exact, statistics=True), sampled, replace(sampled, **certified)):
        out = linear_nll(*inputs, seed, config)
        entries = (out.entry_offsets, out.entry_columns, out.entry_values)
        saved = Saved(out.nll, out.lse, out.lse_low, *entries, seed)
        linear_nll_backward(grad, *inputs, saved, config, wanted)
    linear_nll(*inputs, None, replace(exact, residual="unit"))
    weighting = Weighting("bft")
    bounds = torch.tensor([0, ROWS // 2, ROWS])
    weighted_loss(hidden, weight, target, grad, bounds, bias, exact, weighting, wanted)


CASES: dict[str, Callable[[], None]] = {
    "bf16": lambda: ours(torch.bfloat16),
    "bf16 transformed": lambda: ours(torch.bfloat16, transformed=True),
    "fp16": lambda: ours(torch.float16),
    "fp32": lambda: ours(torch.float32),
    "fp32 transformed": lambda: ours(torch.float32, transformed=True),
    "bf16 D 1000": lambda: ours(torch.bfloat16, width=1000),
}
PEER_CASES: dict[str, Callable[[], None]] = {}

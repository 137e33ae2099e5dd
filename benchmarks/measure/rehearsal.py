"""Calls that together use every form of every kernel, on tensors without values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.problem import ACCELERATOR_BUFFER_BYTES, Problem
from bft_kernels.results import Documents, Saved, Wanted
from bft_kernels.settings import SCHEMES, Settings

# The N, D and V of published figures.
ROWS, WIDTH, VOCABULARY = 8192, 4096, 131_072
# Budgets: the forward keeps logits in a buffer with the first, and in registers with the second.
CHUNKS, TILES = ACCELERATOR_BUFFER_BYTES, 100 * 2**20


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ours(
    operand: torch.dtype,  # of the products
    hidden_dtype: torch.dtype | None = None,  # of the tensors, if autocast rounds them
    weight_dtype: torch.dtype | None = None,
    *,
    width: int = WIDTH,
    transformed: bool = False,  # with a bias, a softcap and smoothing
) -> None:
    """Forward and backward of every mode; `dW` is new, or added to an existing one."""
    from bft_kernels.backends.triton.engine import linear_nll, linear_nll_backward, weighted_loss

    hidden = _empty(ROWS, width, dtype=hidden_dtype or operand)
    weight = _empty(VOCABULARY, width, dtype=weight_dtype or operand)
    target, seed = _empty(ROWS, dtype=torch.int64), _empty(dtype=torch.int64)
    bias = _empty(VOCABULARY, dtype=weight.dtype) if transformed else None
    grad, wanted = _empty(ROWS), Wanted(hidden=True, weight=True, bias=transformed)
    plain = Settings(eps=2**-10, backend="triton", max_buffer_bytes=CHUNKS)
    if transformed:
        plain = replace(plain, softcap=30.0, temperature=0.7)
    sampled = replace(plain, gradient="sampled")
    exact = replace(plain, label_smoothing=0.1, z_loss=1e-4) if transformed else plain
    certified = replace(sampled, return_stats=True, hidden_variance=True)

    def problem(settings: Settings, wanted: Wanted = wanted) -> Problem:
        return Problem(hidden, weight, target, bias, seed, settings, operand, wanted)

    for settings, budget in itertools.product(
        (exact, replace(exact, return_stats=True), sampled, certified), (CHUNKS, TILES)
    ):
        call = problem(replace(settings, max_buffer_bytes=budget))
        out = linear_nll(call)
        saved = Saved(*(getattr(out, name) for name in Saved._fields))
        for given in (None, torch.empty_like(weight)):  # dW is written, or added to
            linear_nll_backward(call, grad, saved, given)
    linear_nll(problem(exact, Wanted(hidden=True, weight=False, bias=False)))
    documents = Documents(_empty(3, dtype=torch.int64), [0, ROWS // 2, ROWS])
    weighted_loss(problem(exact), grad, documents)


def weights() -> None:
    """Weights and loss from token losses, for every scheme and normaliser."""
    from bft_kernels.backends.triton.engine import balanced_loss

    loss, labelled = _empty(ROWS), _empty(ROWS, dtype=torch.bool)
    bounds = _empty(17, dtype=torch.int64)
    for scheme, normalize in itertools.product(SCHEMES, ("sequence", "token")):
        for items in (None, _empty()):
            settings = Settings(scheme=scheme, normalize=normalize)
            balanced_loss(loss, labelled, bounds, items, settings)


_BF16, _FP32 = torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "bf16": lambda: ours(_BF16),
    "bf16 transformed": lambda: ours(_BF16, transformed=True),
    "fp16": lambda: ours(torch.float16),
    "fp32": lambda: ours(_FP32),
    "fp32 transformed": lambda: ours(_FP32, transformed=True),
    "fp32 D 1001": lambda: ours(_FP32, width=1001),
    "bf16 D 1000": lambda: ours(_BF16, width=1000),
    "bf16 of fp32 weight": lambda: ours(_BF16, _BF16, _FP32),
    "bf16 of fp32 weight transformed": lambda: ours(_BF16, _BF16, _FP32, transformed=True),
    "bf16 of fp32": lambda: ours(_BF16, _FP32, _FP32),
    "bf16 of fp32 transformed": lambda: ours(_BF16, _FP32, _FP32, transformed=True),
    "bf16 of fp32 D 1000": lambda: ours(_BF16, _FP32, _FP32, width=1000),
    "weights": weights,
}
# What the gate compiles: a tile for each kind of operands, with and without a softcap. Left out are
# mixtures of types, whose tiles it has, and rows of odd length, whose tile all targets share.
GATE = (
    *("bf16", "bf16 transformed", "fp16", "fp32", "fp32 transformed"),
    *("bf16 of fp32", "bf16 of fp32 transformed", "weights"),
)

"""The gradients from logits that are computed again, a block of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.common.tiles import Recomputation
from bft_kernels.backends.cuda.inputs import operands_of
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.results import Gradients

# Rows and columns of a tile of logits.
TILE = 128


def recompute(
    inputs: Inputs, known: KnownRows, seed: Tensor | None, into: Gradients, *, adds: bool
) -> None:
    """See :meth:`bft_kernels.backends.common.on_device.Kernels.recompute`."""
    settings, rows = inputs.settings, -(-inputs.shape[0] // TILE)
    work = Recomputation.of(inputs, known, into, TILE)
    bias_sums = torch.empty(
        0 if into.bias is None else rows * work.step, dtype=torch.float32, device=work.dy.device
    )
    known, problem = work.known, operands_of(inputs)
    for first, columns in work.blocks():
        _cuda.logit_gradient(
            problem=problem,
            first_column=first,
            columns=columns,
            dy_ptr=out(work.dy),
            stride_dy=work.step,
            lse_ptr=ptr(known.lse),
            lse_low_ptr=ptr(known.lse_low),
            nll_ptr=ptr(known.nll),
            grad_ptr=ptr(known.grad),
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
            seed_ptr=ptr(seed),
            eps=settings.eps,
            bias_sums_ptr=out(bias_sums),
            grad_bias_ptr=out(into.bias),
            scale_ptr=ptr(work.scale),
            stream=stream(),
        )
        if into.hidden is not None:
            _cuda.hidden_gradient(
                problem=problem,
                first_column=first,
                columns=columns,
                dy_ptr=ptr(work.dy),
                stride_dy=work.step,
                sums_ptr=out(work.sums),
                grad_hidden_ptr=out(into.hidden),
                is_float32=into.hidden.dtype == torch.float32,
                scale_ptr=ptr(work.scale),
                stream=stream(),
            )
        if into.weight is not None:
            _cuda.weight_gradient(
                problem=problem,
                first_column=first,
                columns=columns,
                dy_ptr=ptr(work.dy),
                stride_dy=work.step,
                grad_weight_ptr=out(into.weight),
                stride_gv=into.weight.stride(0),
                is_float32=into.weight.dtype == torch.float32,
                adds=adds,
                scale_ptr=ptr(work.scale),
                stream=stream(),
            )

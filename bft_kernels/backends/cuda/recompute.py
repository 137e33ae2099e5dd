"""The gradients from logits that are computed again, a block of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import scale_for
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.cuda.inputs import operands_of
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.results import Gradients

# Rows and columns of a tile of logits.
TILE = 128


def recompute(
    inputs: Inputs, known: KnownRows, seed: Tensor | None, into: Gradients, *, adds: bool
) -> None:
    """Writes or adds the gradients of the rows that ``inputs.rows`` lists.

    For the arguments see :meth:`bft_kernels.backends.common.on_device.Kernels.recompute`.
    """
    count, vocabulary, width = inputs.shape
    call, operand = inputs.call, inputs.call.operand
    device = inputs.hidden.device
    blocks = call.buffer_bytes // max(1, count * operand.itemsize) // TILE
    step = min(-(-vocabulary // TILE), max(1, blocks)) * TILE
    dy = torch.empty(count * step, dtype=operand, device=device)
    row_blocks = -(-count // TILE)
    bias_sums = torch.empty(
        0 if into.bias is None else row_blocks * step, dtype=torch.float32, device=device
    )
    several = into.hidden is not None and step < vocabulary
    sums = torch.empty(count * width if several else 0, dtype=torch.float32, device=device)
    scale = None
    if operand == torch.float16:
        grad, lse = inputs.rows.mask(known.grad), inputs.rows.mask(known.lse)
        scale = scale_for(grad, lse, call.settings.temperature, call.settings.z_loss)
        known = known._replace(grad=known.grad * scale)
    problem = operands_of(inputs)
    for first in range(0, vocabulary, step):
        columns = min(step, vocabulary - first)
        _cuda.logit_gradient(
            problem=problem,
            first_column=first,
            columns=columns,
            dy_ptr=out(dy),
            stride_dy=step,
            lse_ptr=ptr(known.lse),
            lse_low_ptr=ptr(known.lse_low),
            nll_ptr=ptr(known.nll),
            grad_ptr=ptr(known.grad),
            label_smoothing=call.settings.label_smoothing,
            z_loss=call.settings.z_loss,
            seed_ptr=ptr(seed),
            eps=call.settings.eps,
            bias_sums_ptr=out(bias_sums),
            grad_bias_ptr=out(into.bias),
            scale_ptr=ptr(scale),
            stream=stream(),
        )
        if into.hidden is not None:
            _cuda.hidden_gradient(
                problem=problem,
                first_column=first,
                columns=columns,
                dy_ptr=ptr(dy),
                stride_dy=step,
                sums_ptr=out(sums),
                grad_hidden_ptr=out(into.hidden),
                is_float32=into.hidden.dtype == torch.float32,
                scale_ptr=ptr(scale),
                stream=stream(),
            )
        if into.weight is not None:
            _cuda.weight_gradient(
                problem=problem,
                first_column=first,
                columns=columns,
                dy_ptr=ptr(dy),
                stride_dy=step,
                grad_weight_ptr=out(into.weight),
                stride_gv=into.weight.stride(0),
                is_float32=into.weight.dtype == torch.float32,
                adds=adds,
                scale_ptr=ptr(scale),
                stream=stream(),
            )

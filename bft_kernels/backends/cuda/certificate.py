"""The error certificate of the sampled gradient, in a pass of its own when lse is known."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.cuda.inputs import operands_of, splits_of
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream


def certify(inputs: Inputs, results: dict[str, Tensor]) -> None:
    """``variance [N]`` and, if it is wanted, ``hidden_variance [N]``, from lse."""
    call, (count, vocabulary, _) = inputs.call, inputs.shape
    device, operands, norms = inputs.hidden.device, operands_of(inputs), None
    if call.hidden_variance:
        norms = torch.empty(vocabulary, dtype=torch.float32, device=device)
        _cuda.squared_norms(problem=operands, norms_ptr=out(norms), stream=stream())
    splits, columns = splits_of(inputs, count)
    planes = 1 if norms is None else 2
    sums = torch.empty(planes * splits * count, dtype=torch.float32, device=device)
    _cuda.certificate(
        problem=operands,
        first_row=0,
        rows=count,
        splits=splits,
        split_columns=columns,
        sums_ptr=out(sums),
        lse_ptr=ptr(results["lse"]),
        eps=call.settings.eps,
        variance_ptr=out(results["variance"]),
        norms_ptr=ptr(norms),
        hidden_variance_ptr=out(results["hidden_variance"]),
        stream=stream(),
    )

"""The error certificate of the sampled gradient, in a pass of its own once lse is known."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.cuda.forward import splits_for
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream


def certify(inputs: Inputs, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``variance [N]`` and ``hidden_variance [N]``, or ``[0]`` where not wanted."""
    call, (count, vocabulary, _) = inputs.call, inputs.shape
    device = lse.device
    variance = torch.zeros(count if call.variance else 0, dtype=torch.float32, device=device)
    hidden_variance = torch.zeros(
        count if call.hidden_variance else 0, dtype=torch.float32, device=device
    )
    if not (call.variance or call.hidden_variance):
        return variance, hidden_variance
    norms = None
    if call.hidden_variance:
        norms = torch.empty(vocabulary, dtype=torch.float32, device=device)
        _cuda.squared_norms(problem=inputs.operands, norms_ptr=out(norms), stream=stream())
    splits, columns = splits_for(inputs, count)
    planes = 1 if norms is None else 2
    plain = variance if call.variance else torch.empty_like(hidden_variance)
    sums = torch.empty(planes * splits * count, dtype=torch.float32, device=device)
    _cuda.certificate(
        problem=inputs.operands,
        first_row=0,
        rows=count,
        splits=splits,
        split_columns=columns,
        sums_ptr=out(sums),
        lse_ptr=ptr(lse),
        eps=call.settings.eps,
        variance_ptr=out(plain),
        norms_ptr=ptr(norms),
        hidden_variance_ptr=out(hidden_variance),
        stream=stream(),
    )
    return variance, hidden_variance

"""The error certificate of the sampled gradient, in a pass of its own once lse is known."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.cuda.forward import splits_for
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import launch


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
        launch("squared_norms", {}, {"norms": norms}, inputs.operands)
    splits, columns = splits_for(inputs, count)
    planes = 1 if norms is None else 2
    launch(
        "certificate",
        {"lse": lse, "norms": norms},
        {
            "sums": torch.empty(planes * splits * count, dtype=torch.float32, device=device),
            "variance": variance if call.variance else torch.zeros_like(hidden_variance),
            "hidden_variance": hidden_variance,
        },
        inputs.operands,
        first_row=0,
        rows=count,
        splits=splits,
        split_columns=columns,
        eps=call.settings.eps,
    )
    return variance, hidden_variance

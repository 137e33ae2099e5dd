"""The error certificate of the sampled gradient, in a pass of its own once lse is known."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.cuda.forward import splits_for
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import launch


def certify(inputs: Inputs, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``variance [N]`` and ``hidden_variance [N]``, or ``[0]`` where not wanted."""
    config, (count, vocabulary, _) = inputs.config, inputs.shape
    device = lse.device
    variance = torch.zeros(count if config.variance else 0, dtype=torch.float32, device=device)
    hidden_variance = torch.zeros(
        count if config.hidden_variance else 0, dtype=torch.float32, device=device
    )
    if not (config.variance or config.hidden_variance):
        return variance, hidden_variance
    norms = None
    if config.hidden_variance:
        norms = torch.empty(vocabulary, dtype=torch.float32, device=device)
        launch("squared_norms", {}, {"norms": norms}, inputs.problem)
    splits, columns = splits_for(inputs, count)
    planes = 1 if norms is None else 2
    launch(
        "certificate",
        {"lse": lse, "norms": norms},
        {
            "sums": torch.empty(planes * splits * count, dtype=torch.float32, device=device),
            "variance": variance if config.variance else torch.zeros_like(hidden_variance),
            "hidden_variance": hidden_variance,
        },
        inputs.problem,
        first_row=0,
        rows=count,
        splits=splits,
        split_columns=columns,
        eps=config.eps,
    )
    return variance, hidden_variance

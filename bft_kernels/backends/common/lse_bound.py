"""A lower bound of lse that is known before the first logit.

Every split of the vocabulary tests its entries against the bound until its own sum is larger.
Without a bound, the splits of 8192 tokens let through 16 times as many entries as are kept
(Qwen2.5, ``eps`` 2^-12). With it they let through twice as many.
"""

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import Gemm, squared_norms
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import DeviceRows

# The largest rounding error of a product, relative to the sum of its terms' magnitudes, and of a
# bound of lse, relative to the bound.
ROUNDING = 1e-5
# Exponents of bounds of p are raised by it: more than exp, log and sums of exp round off.
EXP_MARGIN = 1e-3

# How many of the batch's targets the bound sums over. 2048 would let through a tenth less.
POPULAR = 1024


def popular_columns(target: Tensor, rows: DeviceRows, vocabulary: int, few: int) -> Tensor:
    """``[few]`` int64: the targets of evenly spaced labelled rows, ascending, some repeated.

    A label of some tokens of the batch is likely for other tokens too.
    """
    places = torch.arange(few, dtype=torch.int64, device=target.device)
    sample = places * rows.count // max(1, few)
    labels = target[rows.order[sample]]
    return labels.clamp(0, vocabulary - 1).sort().values


def raise_bounds(bounds: Tensor, inputs: Inputs) -> Tensor:
    """The larger of ``bounds [N]`` and the bound from the batch's own targets."""
    if bounds.numel() == 0:
        return bounds
    few = min(POPULAR, bounds.numel())
    columns = popular_columns(inputs.target, inputs.rows, inputs.shape[1], few)
    popular = _sums_over(inputs, columns)
    # A logit that is not finite must affect only the rows and columns that have it.
    return torch.where(popular.isfinite(), torch.maximum(bounds, popular), bounds)


def _sums_over(inputs: Inputs, columns: Tensor) -> Tensor:
    """``[N]``: a lower bound of the logsumexp over ``columns [K]``; repeats are counted once."""
    settings, (count, _, width) = inputs.settings, inputs.shape
    few = columns.numel()
    weight = inputs.weight[columns]
    bias = None if inputs.bias is None else inputs.bias[columns].float()
    repeated = torch.nn.functional.pad(columns[1:] == columns[:-1], (1, 0))[:few]
    gemm = Gemm(weight, inputs.call.operand, torch.float32, max(1, few))
    # The vendor's GEMM rounds in another way than the tiles do. The margin covers the largest error
    # of either, relative to |h| |w|. Float32 is never TF32 here; see `precision`.
    longest = squared_norms(weight, torch.float32, inputs.call.buffer_bytes).max().sqrt()
    found = torch.empty(count, dtype=torch.float32, device=columns.device)
    step = max(1, inputs.call.buffer_bytes // (16 * max(few, width)))
    for first in range(0, count, step):
        rows = inputs.hidden[first : first + step]
        z = torch.empty(rows.shape[0], few, dtype=torch.float32, device=columns.device)
        gemm.logits(gemm.rows(rows), z)
        if bias is not None:
            z += bias
        if settings.softcap is not None:
            z.div_(settings.softcap).tanh_().mul_(settings.softcap)
        z.masked_fill_(repeated, -torch.inf)
        margin = ROUNDING * longest * torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        found[first : first + step] = (z / settings.temperature).logsumexp(1)
        found[first : first + step] -= margin / settings.temperature
    return found - ROUNDING * found.abs() - ROUNDING

"""The most probable tokens of each row, from a buffer of logits that other passes read, too."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import transform_logits
from bft_kernels.backends.common.rows import DeviceRows, LabelledRows
from bft_kernels.problem import Problem
from bft_kernels.results import Forward

# Temporaries of a tile, in logits: a copy, and two int64 for each. They take a share of the budget.
SCRATCH, SHARE = 5, 4


class TopLogits:
    """The ``top_k`` largest logits of each row and their columns, the largest first."""

    def __init__(self, problem: Problem, rows: LabelledRows | DeviceRows) -> None:
        self.problem, self.rows = problem, rows
        row_bytes = SCRATCH * problem.shape[1] * problem.acc_dtype.itemsize
        self.tile_rows = max(1, problem.buffer_bytes // SHARE // row_bytes)
        shape = rows.size, problem.settings.top_k
        self.ids = problem.target.new_zeros(shape)
        self.values = problem.hidden.new_zeros(shape, dtype=problem.acc_dtype)

    def take(self, logits: Tensor, first: int) -> None:
        """Takes raw logits ``[n, V]`` of the rows from ``first`` on, and does not change them."""
        for a in range(0, logits.shape[0], self.tile_rows):
            z = logits[a : a + self.tile_rows].clone()
            transform_logits(z, self.problem.bias, self.problem.settings, None)
            ids = largest(z, self.problem.settings.top_k)
            part = slice(first + a, first + a + z.shape[0])
            self.ids[part], self.values[part] = ids, z.gather(1, ids)

    def added_to(self, result: Forward) -> Forward:
        """The results of the call with ids and log-probabilities; -1 and 0 where ignored."""
        ignored = ~self.problem.labelled[:, None]
        ids, values = self.rows.spread(self.ids), self.rows.spread(self.values)
        return result._replace(
            top_ids=ids.masked_fill(ignored, -1),
            top_log_probs=(values - result.lse[:, None]).masked_fill_(ignored, 0),
        )


def largest(z: Tensor, k: int) -> Tensor:
    """The columns of the ``k`` largest values of each row; of equal ones the lowest come first."""
    if z.dtype == torch.float64:
        return z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # `topk` says nothing of ties. So it gets distinct integers, which have the order of the values
    # in their upper half and that of the columns in their lower half.
    key = (z + 0.0).view(torch.int32).long()  # of -0.0 and 0.0 it makes one value
    key ^= (key >> 31).bitwise_and_(2**31 - 1)
    key <<= 32
    key -= torch.arange(z.shape[1], dtype=torch.int64, device=z.device)
    return (-key.topk(k, dim=1).values).bitwise_and_(2**32 - 1)

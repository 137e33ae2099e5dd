"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, eq. 24 and 25): depths are rows of a call.

The main head and each further depth share the output embedding. One call passes over it once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bft_kernels import linear_cross_entropy
from bft_kernels.weighting import shift_labels


def multi_token_loss(
    hidden: Tensor,  # [K, B, T, D]: depth k predicts the token k + 1 positions ahead
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [B, T], not shifted; -100 is ignored
    factors: Sequence[float],  # [K], for example 1 and then 0.3 / (K - 1) each
    cu_seqlens: Tensor | None = None,  # [S + 1] over the B * T positions, of packed documents
) -> Tensor:
    """``sum_k factors[k] * (mean over the labels of depth k)``; no depth leaves its document."""
    targets, scales = [], []
    for factor in factors:
        labels = shift_labels(labels, cu_seqlens)
        targets.append(labels)
        scales.append(factor / (labels != -100).sum().clamp_min(1))
    target = torch.stack(targets)
    scale = torch.stack(scales).view(-1, 1, 1).expand(target.shape)
    return linear_cross_entropy(hidden, weight, target, token_weight=scale, reduction="sum")


if __name__ == "__main__":
    torch.manual_seed(0)
    hidden = torch.randn(3, 2, 16, 32, requires_grad=True)
    weight = torch.randn(512, 32, requires_grad=True)
    loss = multi_token_loss(hidden, weight, torch.randint(512, (2, 16)), [1.0, 0.15, 0.15])
    loss.backward()
    print(loss.item())

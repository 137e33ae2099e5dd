"""The records that the ops return and pass on.

``acc`` is float32, or float64 for float64 inputs. A tensor that is not wanted has size 0 in its
first dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """Results of ``linear_nll``."""

    loss: Tensor  # [N] acc, differentiable; lse and entropy are where that is asked for
    nll: Tensor  # [N] acc
    lse: Tensor  # [N] acc
    lse_low: Tensor  # [N] acc, the part of lse that rounding cut off; for a recomputing backward
    entropy: Tensor  # [N] acc
    correct: Tensor  # [N] bool
    variance: Tensor  # [N] acc
    hidden_variance: Tensor  # [N] acc
    unit: Tensor  # [N, D] storage type of hidden, dH for unit upstream gradient
    csr_offsets: Tensor  # [N + 1] int64
    # A backend may keep more entries than the sample has, without values, and thin them in its
    # backward.
    csr_columns: Tensor  # [E] int32
    csr_values: Tensor  # [E] acc, dy for unit upstream gradient; or [0]
    # With top_k, which is the work of an op of its own:
    top_ids: Tensor | None = None  # [N, k] int64
    top_log_probs: Tensor | None = None  # [N, k] acc


class Saved(NamedTuple):
    """The results of ``linear_nll``'s forward that its backward reads."""

    nll: Tensor
    lse: Tensor
    lse_low: Tensor
    csr_offsets: Tensor
    csr_columns: Tensor
    csr_values: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    adapter: bool = False


class Gradients(NamedTuple):
    """``None`` if not wanted. The bias's gradient is acc, the others have their input's type."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    adapter: Tensor | None = None  # [V, r]


class Documents(NamedTuple):
    """Where documents begin and end, for code that plans on the host and computes on a device."""

    cu_seqlens: Tensor  # [S + 1] int64, on the tokens' device
    bounds: list[int]  # the same on the host, known without asking the device


class WeightedLoss(NamedTuple):
    """Results of ``weighted_loss``."""

    loss: Tensor  # [] acc, the only differentiable one
    grad_hidden: Tensor  # [N, D] storage type of hidden, for unit upstream gradient
    grad_weight: Tensor  # [V, D] storage type of weight
    grad_bias: Tensor  # [V] acc
    nll: Tensor  # [N] acc
    lse: Tensor  # [N] acc
    entropy: Tensor  # [N] acc
    correct: Tensor  # [N] bool
    # Only with statistics, and for a scheme that looks at documents; otherwise of size 0:
    token_weight: Tensor  # [N] acc
    window_confidence: Tensor  # [N] acc
    sequence_weight: Tensor  # [S] acc
    sequence_confidence: Tensor  # [S] acc
    # Only with an adapter:
    grad_adapter: Tensor | None = None  # [V, r] storage type of adapter


class BalancedLoss(NamedTuple):
    """Results of ``balanced_loss``; ignored tokens and documents without labels weigh 0."""

    loss: Tensor  # [] acc, the only differentiable one
    coefficient: Tensor  # [N] acc, the factor of each token's loss
    token_weight: Tensor  # [N] acc
    window_confidence: Tensor  # [N] acc
    sequence_weight: Tensor  # [S] acc
    sequence_confidence: Tensor  # [S] acc

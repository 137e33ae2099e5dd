"""The settings of one call, as they travel from the public functions to the backends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class CoreConfig:
    """What the core op computes and keeps. Field names and order are those of the op's schema."""

    ignore_index: int = -100
    softcap: float | None = None
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    eps: float = 2**-12
    # What the forward keeps for the backward:
    #   none       nothing: no gradient is wanted
    #   recompute  only lse, to twice the precision; logits are computed again (exact, 4G)
    #   unit       dH for unit upstream gradient (exact with a frozen head, 2G)
    #   entries    the sparse sample of dz (sampled, 1G)
    residual: str = "none"
    statistics: bool = False  # entropy and correct
    variance: bool = False  # the certificate of the sampled gradient
    hidden_variance: bool = False
    # Name of the type the operands of the matrix products are rounded to (autocast); accumulation
    # is always in float32, or float64 for float64.
    operand: str = "float32"
    backend: str = "auto"
    max_buffer_bytes: int = 2**26
    check_values: bool = False
    check_finite: bool = False

    @property
    def operand_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.operand)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def arguments(self) -> list[Any]:
        """The settings in the order of the ops' schemas."""
        return [getattr(self, field.name) for field in fields(self)]


# The part of the ops' schemas that carries a CoreConfig, in the order of its fields.
CONFIG_SCHEMA = (
    "int ignore_index, float? softcap, float temperature, float label_smoothing, float z_loss, "
    "float eps, str residual, bool statistics, bool variance, bool hidden_variance, str operand, "
    "str backend, int max_buffer_bytes, bool check_values, bool check_finite"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 throughout; everything narrower is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type a gradient of ``dtype`` is kept in until its upstream gradient is known.

    float16 has too little range below 1: a loss scale can only arrive with the backward, too late
    for values that have already become 0.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Weighting:
    """Settings of the token and sequence weights; see :func:`bft_kernels.token_weights`."""

    scheme: str
    window: int = 256
    gamma: float = 1.0
    floor: float = 1e-8

    @property
    def local(self) -> bool:
        """Whether a token's weight depends on that token alone."""
        return self.scheme in ("sft", "dft")

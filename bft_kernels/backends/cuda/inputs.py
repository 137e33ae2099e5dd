"""The operands of a call as the CUDA kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bft_kernels.backends.cuda.native import TYPES, _cuda, ptr
from bft_kernels.backends.gpu.inputs import DeviceInputs
from bft_kernels.config import CoreConfig


@dataclass(frozen=True)
class Inputs(DeviceInputs):
    """The operands, both of one type: stored in another, they are copied for the call."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        config: CoreConfig,
    ) -> Self:
        operand = config.operand_dtype
        bias = None if bias is None else bias.float()
        return super().of(hidden.to(operand), weight.to(operand), target, bias, config)

    @property
    def problem(self) -> _cuda.Problem:
        """What kernels that make logits read. It keeps no tensor alive."""
        config, (count, vocabulary, width) = self.config, self.shape
        return _cuda.Problem(
            hidden_ptr=ptr(self.hidden),
            weight_ptr=ptr(self.weight),
            bias_ptr=ptr(self.bias),
            target_ptr=ptr(self.target),
            order_ptr=ptr(self.rows.order),
            count_ptr=ptr(self.rows.count),
            N=count,
            V=vocabulary,
            D=width,
            stride_hn=self.hidden.stride(0),
            stride_wv=self.weight.stride(0),
            dtype=TYPES[config.operand_dtype],
            softcap=config.softcap or 0.0,
            temperature=config.temperature,
        )

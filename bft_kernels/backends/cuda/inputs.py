"""The operands of a call as the CUDA kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from bft_kernels.backends.common.inputs import DeviceInputs
from bft_kernels.backends.cuda.native import TYPES, _cuda, ptr
from bft_kernels.problem import Problem


@dataclass(frozen=True)
class Inputs(DeviceInputs):
    """The operands, both of one type: stored in another, they are copied for the call."""

    @classmethod
    def of(cls, problem: Problem) -> Self:
        made = super().of(
            replace(
                problem,
                hidden=problem.hidden.to(problem.operand),
                weight=problem.weight.to(problem.operand),
                bias=None if problem.bias is None else problem.bias.float(),
            )
        )
        return replace(made, call=problem)

    @property
    def operands(self) -> _cuda.Problem:
        """What kernels that make logits read. It keeps no tensor alive."""
        call, (count, vocabulary, width) = self.call, self.shape
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
            dtype=TYPES[call.operand],
            softcap=call.settings.softcap or 0.0,
            temperature=call.settings.temperature,
        )

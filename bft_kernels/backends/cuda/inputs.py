"""The operands of a call as the CUDA kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from bft_kernels.backends.common.inputs import DeviceInputs
from bft_kernels.backends.cuda.native import Operands
from bft_kernels.problem import Problem

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    def operands(self) -> Operands:
        call, (count, vocabulary, width) = self.call, self.shape
        tensors = {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "target": self.target,
            "order": self.rows.order,
            "count": self.rows.count,
        }
        numbers = {
            "N": count,
            "V": vocabulary,
            "D": width,
            "stride_hn": self.hidden.stride(0),
            "stride_wv": self.weight.stride(0),
            "dtype": _TYPES[call.operand],
            "softcap": call.settings.softcap or 0.0,
            "temperature": call.settings.temperature,
        }
        return Operands(tensors, numbers)

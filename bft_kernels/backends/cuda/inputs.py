"""The operands of a call as the CUDA kernels take them."""

from __future__ import annotations

from dataclasses import replace

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.tensors import processors
from bft_kernels.backends.cuda.native import TYPES, _cuda, ptr
from bft_kernels.problem import Problem


def make_inputs(problem: Problem) -> Inputs:
    """The operands in the type of GEMMs; those stored in another type are copied."""
    made = Inputs.of(
        replace(
            problem,
            hidden=problem.hidden.to(problem.operand),
            weight=problem.weight.to(problem.operand),
            bias=None if problem.bias is None else problem.bias.float(),
        )
    )
    return replace(made, call=problem)


def operands_of(inputs: Inputs) -> _cuda.Problem:
    """The argument of kernels that make logits. It keeps no tensor alive."""
    call, (count, vocabulary, width) = inputs.call, inputs.shape
    return _cuda.Problem(
        hidden_ptr=ptr(inputs.hidden),
        weight_ptr=ptr(inputs.weight),
        bias_ptr=ptr(inputs.bias),
        target_ptr=ptr(inputs.target),
        order_ptr=ptr(inputs.rows.order),
        count_ptr=ptr(inputs.rows.count),
        N=count,
        V=vocabulary,
        D=width,
        stride_hn=inputs.hidden.stride(0),
        stride_wv=inputs.weight.stride(0),
        dtype=TYPES[call.operand],
        softcap=call.settings.softcap or 0.0,
        temperature=call.settings.temperature,
    )


def splits_of(inputs: Inputs, rows: int) -> tuple[int, int]:
    """How many parts of the vocabulary a pass over ``rows`` rows has, and columns of each."""
    return _cuda.forward_splits(rows, inputs.shape[1], processors(inputs.hidden.device))

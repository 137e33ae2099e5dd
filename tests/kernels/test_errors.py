"""Every public function refuses bad input: the message names the argument, what came, what was
expected.
"""

import math
import re
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import randn, tensor

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    token_weights,
)
from bft_kernels.problem import _fit, check_core
from bft_kernels.weighting import (
    cu_seqlens_from_attention_mask,
    cu_seqlens_from_position_ids,
    shift_labels,
)

N, D, V = 6, 4, 9
NAN = float("nan")


def good(**changes):
    return {"hidden": randn(N, D), "weight": randn(V, D), "target": torch.arange(N)} | changes


def with_nan(shape):
    values = randn(shape)
    values[1, 2] = NAN
    return values


class Case(NamedTuple):
    """A wrong argument, and what the message says of it."""

    name: str
    error: type[Exception]
    arguments: dict
    said: tuple[str, ...]


def wrong(name, value, *said, **others):
    """What came goes without saying where it is the value itself."""
    return Case(
        name, ValueError, {name: value, **others}, said if said[1:] else (str(value), *said)
    )


def wrong_type(name, value, *said, **others):
    """What came goes without saying where it is the type of the value."""
    said = said if said[1:] else (type(value).__name__, *said)
    return Case(name, TypeError, {name: value, **others}, said)


CORE = [
    wrong_type("hidden", [1.0], "Tensor"),
    wrong("hidden", tensor(1.0), "()", "D"),
    wrong_type("hidden", torch.ones(N, D, dtype=torch.int64), "int64", "float32"),
    wrong_type("weight", None, "Tensor"),
    wrong("weight", randn(V, D + 1), f"({V}, {D + 1})", f"(V, {D}), since hidden has {D} features"),
    wrong("weight", randn(V), f"({V},)", f"(V, {D})"),
    wrong("weight", randn(0, D), f"(0, {D})", "at least 1"),
    wrong("weight", randn(V, 0), f"({V}, 0)", "at least 1", hidden=randn(N, 0)),
    wrong_type("weight", randn(V, D).double(), "float64", "both float64"),
    wrong_type("weight", randn(V, D).to(torch.int8), "int8", "float32"),
    wrong("weight", randn(V, D, device="meta"), "meta", "cpu"),
    wrong("target", torch.arange(N + 1), f"({N + 1},)", f"({N})"),
    wrong_type("target", torch.arange(N).short(), "int16", "int64"),
    wrong("target", torch.arange(N, device="meta"), "meta", "cpu"),
    wrong("target", torch.arange(N) + V, f"{V}", f"{V - 1}"),
    wrong("target", torch.full((N,), -1), "-1", "ignore_index = -100"),
    wrong("bias", randn(V + 1), f"({V + 1},)", f"({V})"),
    wrong("bias", randn(V, device="meta"), "meta", "cpu"),
    wrong_type("ignore_index", 1.5, "int"),
    wrong("softcap", 0.0, "above 0"),
    wrong("softcap", -3.0, "at least 0"),
    wrong("temperature", 0.0, "above 0"),
    wrong("temperature", NAN, "finite"),
    wrong_type("temperature", "1", "number"),
    wrong("gradient", "approximate", "'exact', 'sampled'"),
    wrong("eps", 0.0, "above 0"),
    wrong("eps", 1.5, "between 0 and 1"),
    wrong_type("seed", 1.0, "int", gradient="sampled"),
    wrong("seed", 2**63, f"at most {2**63 - 1}", gradient="sampled"),
    wrong("seed", tensor([1]), "(1,)", "()"),
    wrong_type("seed", tensor(1.0), "float32", "int64"),
    wrong("backend", "cuda-magic", "torch"),
    wrong("max_buffer_bytes", 0, "at least 1"),
    wrong_type("max_buffer_bytes", 1e6, "int"),
    wrong("hidden", with_nan((N, D)), "nan in row 1", "finite", check=True),
    wrong("weight", with_nan((V, D)), "nan in row 1", "finite", check=True),
    wrong_type("hidden", randn(N, D).to_sparse(), "sparse_coo", "torch.strided"),
    wrong_type("bias", randn(V).double(), "float64", "both float64"),
    wrong("bias", tensor([math.inf, *[0.0] * (V - 1)]), "inf in position 0", "-inf", check=True),
    wrong("ignore_index", 2**63, "at most"),
    wrong("max_buffer_bytes", 2**70, "at most"),
    wrong_type("backend", None, "name"),
    wrong_type("check", "yes", "bool"),
    wrong_type("return_stats", 1, "bool"),
    wrong("hidden_variance", True, "sampled"),
    wrong("out_dtype", torch.int64, "int64", "torch.float16"),
    # Values that equal the default, of another type.
    wrong_type("temperature", True, "number"),
    wrong_type("ignore_index", -100.0, "int"),
    wrong_type("check", 0, "bool"),
]
UNREDUCED = [
    wrong("top_k", -1, "at least 0"),
    wrong("top_k", V + 1, f"at most V = {V}"),
    wrong_type("top_k", 2.0, "int"),
    wrong_type("differentiable", "lse", "str", "tuple"),
    wrong("differentiable", ("lse", "nll"), "'nll'", "'lse', 'entropy'"),
    wrong("differentiable", ("entropy",), "'entropy'", "gradient='exact'", gradient="sampled"),
]
REDUCED = [
    wrong("reduction", "median", "'none', 'mean', 'sum'"),
    wrong("label_smoothing", 1.5, "between 0.0 and 1.0"),
    wrong("label_smoothing", -0.1, "between 0.0 and 1.0"),
    wrong("z_loss", -1.0, "at least 0"),
    wrong("label_smoothing", 0.1, "gradient='exact'", gradient="sampled"),
    wrong("z_loss", 0.1, "gradient='exact'", gradient="sampled"),
    wrong("token_weight", torch.ones(N - 1), f"({N - 1},)", f"({N})"),
    wrong_type("token_weight", torch.ones(N).long(), "int64", "float32"),
    wrong("token_weight", torch.full((N,), NAN), "nan in row 0", "finite", check=True),
    wrong("token_weight", torch.ones(N, requires_grad=True), "requires a gradient", "constant"),
    wrong("class_weight", torch.ones(N), f"({N},)", f"({V})"),
    wrong_type("class_weight", [1.0] * V, "list", "Tensor"),
    wrong("class_weight", torch.full((V,), NAN), "nan in position 0", "finite", check=True),
    wrong("class_weight", torch.ones(V, requires_grad=True), "requires a gradient", "constant"),
]
BALANCED = [
    wrong("scheme", "best", "'bft'"),
    wrong_type("scheme", 3, "callable"),
    wrong("window", 0, "at least 1"),
    wrong_type("window", 2.5, "int"),
    wrong_type("window", 256.0, "int"),
    wrong("gamma", 0.0, "above 0"),
    wrong("normalize", "batch", "'sequence', 'token'"),
    wrong("num_items", 0, f"0 with {N} labelled", "the whole step"),
    wrong("num_items", 0.0, "got 0 with", "whole step", check=False),
    wrong("num_items", -2, "at least 0"),
    wrong("num_items", tensor(0), f"0 with {N}", "None to count"),
    wrong("num_items", tensor(0.0), "0", "step", check=False),
    wrong("num_items", tensor(-3.0), "-3.0", "at least 0"),
    wrong("num_items", tensor(-3), "-3", "least 0", check=False),
    wrong("num_items", tensor(NAN), "nan", "finite"),
    wrong_type("num_items", tensor(2j), "complex64", "count"),
    wrong_type("num_items", tensor(True), "bool", "count"),
    wrong("window", 2**63, "at most"),
    wrong("num_items", torch.ones(2), "(2,)", "[]"),
    wrong_type("cu_seqlens", [0, N], "Tensor"),
    wrong_type("cu_seqlens", tensor([0.0, N]), "float32", "int32"),
    wrong("cu_seqlens", tensor([[0, N]]), "(1, 2)", "(S + 1)"),
    wrong("cu_seqlens", tensor([], dtype=torch.int64), "(0,)", "S"),
    wrong("cu_seqlens", tensor([1, N]), "starts at 1", "0"),
    wrong("cu_seqlens", tensor([0, N - 1]), f"{N - 1}", f"{N}"),
    wrong("cu_seqlens", tensor([0, 4, 2, N]), "4 to 2", "at least 0"),
    wrong("cu_seqlens", tensor([0, N], device="meta"), "meta", "cpu"),
    wrong(
        *("cu_seqlens", None, "None with a target of shape (1, 2, 3)", "boundaries"),
        hidden=randn(1, 2, 3, D),
        target=torch.zeros(1, 2, 3, dtype=torch.int64),
    ),
    wrong("scheme", lambda c, cu: (c[:1], c[:1]), "token_weight has shape (1,)", f"({N},)"),
    wrong("scheme", lambda c, cu: (c, 1.0), "sequence_weight has shape float", "(1,)"),
    wrong("scheme", lambda c, cu: None, "NoneType", "sequence_weight"),
    wrong("scheme", lambda c, cu: (c, c, c), "tuple", "sequence_weight"),
    wrong("scheme", lambda c, cu: (c / 0, c[:1]), "token_weight: got inf", "finite"),
    wrong("scheme", lambda c, cu: (c, c[:1] * NAN), "sequence_weight: got nan", "finite"),
    wrong_type("scheme", lambda c: c, "<lambda> takes (c)", "(confidence, cu_seqlens)"),
    wrong_type("scheme", Case, "Case takes (", "(confidence, cu_seqlens)"),
]
WEIGHTS = [
    wrong_type("confidence", [0.5], "Tensor"),
    wrong("confidence", torch.ones(2, 2), "(2, 2)", "(n)"),
    wrong_type("confidence", torch.ones(4).half(), "float16", "float32"),
    wrong("cu_seqlens", tensor([0, 3]), "3", "4"),
    wrong("scheme", "best", "'bft'"),
    wrong("window", -1, "at least 1"),
    wrong_type("window", True, "int"),
    wrong("gamma", -1.0, "at least 0"),
    wrong("floor", 0.0, "above 0"),
    wrong("confidence", tensor([0.5, NAN, 1, 1]), "nan in position 1", "0 to 1"),
    wrong("confidence", tensor([0.5, 1, 3, -1]), "3.0 in position 2 (2", "0 to 1"),
]
MADE = [  # when a module is made
    wrong_type("softcapp", 3.0, "unexpected", "softcap"),
    wrong("temperature", 0.0, "above 0"),
    wrong("gradient", "x", "'exact'"),
    wrong_type("max_buffer_bytes", "1", "int"),
]
LOSSES = (linear_nll, linear_cross_entropy, balanced_linear_cross_entropy)
LABELS = torch.zeros(1, 3, dtype=torch.int64)
WRONG = [
    *((function, good(), case) for function in LOSSES for case in CORE),
    *((linear_nll, good(), case) for case in UNREDUCED),
    *((linear_cross_entropy, good(), case) for case in REDUCED),
    *((balanced_linear_cross_entropy, good(), case) for case in BALANCED),
    *(
        (token_weights, {"confidence": torch.rand(4), "cu_seqlens": tensor([0, 4])}, case)
        for case in WEIGHTS
    ),
    (shift_labels, {}, wrong("labels", tensor(3), "()", "(B, T)")),
    (shift_labels, {"labels": LABELS}, wrong("cu_seqlens", tensor([0, 2]), "2", "3")),
    *(
        (function, {}, wrong(name, torch.ones(3, dtype=torch.int64), "(3,)", "(B, T)"))
        for function, name in (
            (cu_seqlens_from_position_ids, "position_ids"),
            (cu_seqlens_from_attention_mask, "attention_mask"),
        )
    ),
    *((LinearCrossEntropyLoss, {}, case) for case in MADE),
    *(
        (BalancedLinearCrossEntropyLoss, {}, case)
        for case in [
            *(*MADE, wrong("scheme", "foo", "'bft'"), wrong("window", 0, "at least 1")),
            wrong_type("scheme", lambda c: c, "<lambda> takes (c)", "(confidence, cu_seqlens)"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("function", "others", "case"),
    WRONG,
    ids=[f"{function.__name__}-{case.name}-{case.said[0]}" for function, _, case in WRONG],
)
def test_arguments(function, others, case):
    with pytest.raises(case.error) as caught:
        function(**(others | case.arguments))
    message = str(caught.value)
    assert re.match(rf"{case.name}\b", message), message
    for said in case.said:
        assert said in message, f"{said!r} not in: {message}"


def test_check_false_looks_at_no_boundaries():
    bounds = torch.tensor([0, 4, 2, N])
    loss = balanced_linear_cross_entropy(
        **good(cu_seqlens=bounds, check=False, gradient="sampled", seed=0)
    )
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("how", [{}, {"check": False}], ids=str)
def test_nan_is_reported_only_when_asked(how):
    assert linear_nll(**good(hidden=with_nan((N, D)), **how)).isnan().sum() == 1


def test_the_quick_check_and_the_full_one_agree():
    """Only where `_fit` is false, `check_core` is asked what is wrong; it takes narrow targets."""
    types = torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8

    def given(*shapes):
        first = torch.zeros(shapes[0])
        changed = [*map(first.to, types), first.to("meta"), first.to_sparse()]
        return [*map(torch.zeros, shapes), *changed, None, 1.0]

    hiddens = given((N, D), (N, 1, D), (D,), (N, V), (N, 0), ())
    weights = given((V, D), (D, V), (V,), (0, D), (V, 0), (1, V, D))
    weights.append(torch.zeros(1, D).expand(2**31, D))
    passed, others = 0, (given((N,), (N, 1), (D,), ()), given((V,), (N,), (V, 1), ()))
    for hidden, weight, target, bias in product(hiddens, weights, *others):
        try:
            check_core(hidden, weight, target, bias)
            passes = target.dtype == torch.int64
        except (TypeError, ValueError):
            passes = False
        assert _fit(hidden, weight, target, bias) == passes
        passed += passes
    assert passed > 5

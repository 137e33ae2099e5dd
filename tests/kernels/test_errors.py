"""Every public function refuses bad input: the message names the argument, what came, what was
expected.
"""

import math
import re

import pytest
import torch

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    token_weights,
)
from bft_kernels.weighting import (
    cu_seqlens_from_attention_mask,
    cu_seqlens_from_position_ids,
    shift_labels,
)

N, D, V = 6, 4, 9
NAN = float("nan")


def good(**changes):
    values = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D), "target": torch.arange(N)}
    return values | changes


def with_nan(shape):
    values = torch.randn(shape)
    values[1, 2] = NAN
    return values


# changes, error, what the message says: argument, what came, what was expected.
CORE = [
    ({"hidden": [1.0]}, TypeError, ("hidden", "list", "Tensor")),
    ({"hidden": torch.tensor(1.0)}, ValueError, ("hidden", "()", "D")),
    ({"hidden": torch.ones(N, D, dtype=torch.int64)}, TypeError, ("hidden", "int64", "float32")),
    ({"weight": None}, TypeError, ("weight", "NoneType", "Tensor")),
    ({"weight": torch.randn(V, D + 1)}, ValueError, ("weight", f"({V}, {D + 1})", f"(any, {D})")),
    ({"weight": torch.randn(V)}, ValueError, ("weight", f"({V},)", f"(any, {D})")),
    ({"weight": torch.randn(0, D)}, ValueError, ("weight", f"(0, {D})", "at least 1")),
    (
        {"hidden": torch.randn(N, 0), "weight": torch.randn(V, 0)},
        ValueError,
        ("weight", f"({V}, 0)", "at least 1"),
    ),
    ({"weight": torch.randn(V, D).double()}, TypeError, ("weight", "float64", "both float64")),
    ({"weight": torch.randn(V, D).to(torch.int8)}, TypeError, ("weight", "int8", "float32")),
    ({"weight": torch.randn(V, D, device="meta")}, ValueError, ("weight", "meta", "cpu")),
    ({"target": torch.arange(N + 1)}, ValueError, ("target", f"({N + 1},)", f"({N})")),
    ({"target": torch.arange(N).int()}, TypeError, ("target", "int32", "int64")),
    ({"target": torch.arange(N, device="meta")}, ValueError, ("target", "meta", "cpu")),
    ({"target": torch.arange(N) + V}, ValueError, ("target", f"{V}", f"{V - 1}")),
    ({"target": torch.full((N,), -1)}, ValueError, ("target", "-1", "ignore_index = -100")),
    ({"bias": torch.randn(V + 1)}, ValueError, ("bias", f"({V + 1},)", f"({V})")),
    ({"bias": torch.randn(V, device="meta")}, ValueError, ("bias", "meta", "cpu")),
    ({"ignore_index": 1.5}, TypeError, ("ignore_index", "float", "int")),
    ({"softcap": 0.0}, ValueError, ("softcap", "0.0", "above 0")),
    ({"softcap": -3.0}, ValueError, ("softcap", "-3.0", "at least 0")),
    ({"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
    ({"temperature": NAN}, ValueError, ("temperature", "nan", "finite")),
    ({"temperature": "1"}, TypeError, ("temperature", "str", "number")),
    ({"gradient": "approximate"}, ValueError, ("gradient", "approximate", "'exact', 'sampled'")),
    ({"eps": 0.0}, ValueError, ("eps", "0.0", "above 0")),
    ({"eps": 1.5}, ValueError, ("eps", "1.5", "between 0 and 1")),
    ({"seed": 1.0, "gradient": "sampled"}, TypeError, ("seed", "float", "int")),
    (
        {"seed": 2**63, "gradient": "sampled"},
        ValueError,
        ("seed", str(2**63), f"at most {2**63 - 1}"),
    ),
    ({"seed": torch.tensor([1])}, ValueError, ("seed", "(1,)", "()")),
    ({"seed": torch.tensor(1.0)}, TypeError, ("seed", "float32", "int64")),
    ({"backend": "cuda-magic"}, ValueError, ("backend", "cuda-magic", "torch")),
    ({"max_buffer_bytes": 0}, ValueError, ("max_buffer_bytes", "0", "at least 1")),
    ({"max_buffer_bytes": 1e6}, TypeError, ("max_buffer_bytes", "float", "int")),
    ({"hidden": with_nan((N, D)), "check": True}, ValueError, ("hidden", "nan in row 1", "finite")),
    ({"weight": with_nan((V, D)), "check": True}, ValueError, ("weight", "nan in row 1", "finite")),
    (
        {"hidden": torch.randn(N, D).to_sparse()},
        TypeError,
        ("hidden", "sparse_coo", "torch.strided"),
    ),
    ({"bias": torch.randn(V).double()}, TypeError, ("bias", "float64", "both float64")),
    (
        {"bias": torch.tensor([math.inf, *[0.0] * (V - 1)]), "check": True},
        ValueError,
        ("bias", "inf in position 0", "-inf"),
    ),
    ({"ignore_index": 2**63}, ValueError, ("ignore_index", str(2**63), "at most")),
    ({"max_buffer_bytes": 2**70}, ValueError, ("max_buffer_bytes", str(2**70), "at most")),
    ({"backend": None}, TypeError, ("backend", "NoneType", "name")),
    ({"check": "yes"}, TypeError, ("check", "str", "bool")),
    ({"return_stats": 1}, TypeError, ("return_stats", "int", "bool")),
    ({"hidden_variance": True}, ValueError, ("hidden_variance", "True", "sampled")),
]

REDUCED = [
    ({"reduction": "median"}, ValueError, ("reduction", "median", "'none', 'mean', 'sum'")),
    ({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "1.5", "between 0.0 and 1.0")),
    ({"label_smoothing": -0.1}, ValueError, ("label_smoothing", "-0.1", "between 0.0 and 1.0")),
    ({"z_loss": -1.0}, ValueError, ("z_loss", "-1.0", "at least 0")),
    (
        {"label_smoothing": 0.1, "gradient": "sampled"},
        ValueError,
        ("label_smoothing", "0.1", "gradient='exact'"),
    ),
    ({"z_loss": 0.1, "gradient": "sampled"}, ValueError, ("z_loss", "0.1", "gradient='exact'")),
    ({"token_weight": torch.ones(N - 1)}, ValueError, ("token_weight", f"({N - 1},)", f"({N})")),
    ({"token_weight": torch.ones(N).long()}, TypeError, ("token_weight", "int64", "float32")),
    (
        {"token_weight": torch.full((N,), NAN), "check": True},
        ValueError,
        ("token_weight", "nan in row 0", "finite"),
    ),
    (
        {"token_weight": torch.ones(N, requires_grad=True)},
        ValueError,
        ("token_weight", "requires a gradient", "constant"),
    ),
]

BALANCED = [
    ({"scheme": "best"}, ValueError, ("scheme", "best", "'bft'")),
    ({"scheme": 3}, TypeError, ("scheme", "int", "callable")),
    ({"window": 0}, ValueError, ("window", "0", "at least 1")),
    ({"window": 2.5}, TypeError, ("window", "float", "int")),
    ({"gamma": 0.0}, ValueError, ("gamma", "0.0", "above 0")),
    ({"normalize": "batch"}, ValueError, ("normalize", "batch", "'sequence', 'token'")),
    ({"num_items": 0}, ValueError, ("num_items", f"0 with {N} labelled", "the whole step")),
    ({"num_items": 0.0, "check": False}, ValueError, ("num_items", "got 0 with", "whole step")),
    ({"num_items": -2}, ValueError, ("num_items", "-2", "at least 0")),
    ({"num_items": torch.tensor(0)}, ValueError, ("num_items", f"0 with {N}", "None to count")),
    ({"num_items": torch.tensor(0.0), "check": False}, ValueError, ("num_items", "0", "step")),
    ({"num_items": torch.tensor(-3.0)}, ValueError, ("num_items", "-3.0", "at least 0")),
    ({"num_items": torch.tensor(-3), "check": False}, ValueError, ("num_items", "-3", "least 0")),
    ({"num_items": torch.tensor(NAN)}, ValueError, ("num_items", "nan", "finite")),
    ({"num_items": torch.tensor(2j)}, TypeError, ("num_items", "complex64", "count")),
    ({"num_items": torch.tensor(True)}, TypeError, ("num_items", "bool", "count")),
    ({"window": 2**63}, ValueError, ("window", str(2**63), "at most")),
    ({"num_items": torch.ones(2)}, ValueError, ("num_items", "(2,)", "[]")),
    ({"cu_seqlens": [0, N]}, TypeError, ("cu_seqlens", "list", "Tensor")),
    ({"cu_seqlens": torch.tensor([0.0, N])}, TypeError, ("cu_seqlens", "float32", "int32")),
    ({"cu_seqlens": torch.tensor([[0, N]])}, ValueError, ("cu_seqlens", "(1, 2)", "(any)")),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, ("cu_seqlens", "(0,)", "S")),
    ({"cu_seqlens": torch.tensor([1, N])}, ValueError, ("cu_seqlens", "starts at 1", "0")),
    ({"cu_seqlens": torch.tensor([0, N - 1])}, ValueError, ("cu_seqlens", f"{N - 1}", f"{N}")),
    (
        {"cu_seqlens": torch.tensor([0, 4, 2, N])},
        ValueError,
        ("cu_seqlens", "4 to 2", "at least 0"),
    ),
    (
        {"cu_seqlens": torch.tensor([0, N], device="meta")},
        ValueError,
        ("cu_seqlens", "meta", "cpu"),
    ),
    (
        {"scheme": lambda c, cu: (c[:1], c[:1])},
        ValueError,
        ("scheme", "token_weight has shape (1,)", f"({N},)"),
    ),
    (
        {"scheme": lambda c, cu: (c, 1.0)},
        ValueError,
        ("scheme", "sequence_weight has shape float", "(1,)"),
    ),
    ({"scheme": lambda c, cu: None}, ValueError, ("scheme", "NoneType", "sequence_weight")),
    ({"scheme": lambda c, cu: (c, c, c)}, ValueError, ("scheme", "tuple", "sequence_weight")),
]


def refused(function, arguments, error, parts):
    with pytest.raises(error) as caught:
        function(**arguments)
    name, came, expected = parts
    message = str(caught.value)
    assert re.match(rf"{name}\b", message), message
    assert came in message, f"{came!r} not in: {message}"
    assert expected in message, f"{expected!r} not in: {message}"


def labels(cases):
    return [f"{parts[0]}-{parts[1]}" for _, _, parts in cases]


@pytest.mark.parametrize(
    "function", [linear_nll, linear_cross_entropy, balanced_linear_cross_entropy]
)
@pytest.mark.parametrize(("changes", "error", "parts"), CORE, ids=labels(CORE))
def test_core_arguments(function, changes, error, parts):
    refused(function, good(**changes), error, parts)


@pytest.mark.parametrize(("changes", "error", "parts"), REDUCED, ids=labels(REDUCED))
def test_cross_entropy_arguments(changes, error, parts):
    refused(linear_cross_entropy, good(**changes), error, parts)


@pytest.mark.parametrize(("changes", "error", "parts"), BALANCED, ids=labels(BALANCED))
def test_balanced_arguments(changes, error, parts):
    refused(balanced_linear_cross_entropy, good(**changes), error, parts)


def test_a_target_of_three_dimensions_needs_boundaries():
    arguments = good(hidden=torch.randn(1, 2, 3, D), target=torch.zeros(1, 2, 3, dtype=torch.int64))
    refused(
        balanced_linear_cross_entropy,
        arguments,
        ValueError,
        ("cu_seqlens", "None with a target of shape (1, 2, 3)", "boundaries"),
    )


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"confidence": [0.5]}, TypeError, ("confidence", "list", "Tensor")),
        ({"confidence": torch.ones(2, 2)}, ValueError, ("confidence", "(2, 2)", "(any)")),
        ({"confidence": torch.ones(4).half()}, TypeError, ("confidence", "float16", "float32")),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, ("cu_seqlens", "3", "4")),
        ({"scheme": "best"}, ValueError, ("scheme", "best", "'bft'")),
        ({"window": -1}, ValueError, ("window", "-1", "at least 1")),
        ({"window": True}, TypeError, ("window", "bool", "int")),
        ({"gamma": -1.0}, ValueError, ("gamma", "-1.0", "at least 0")),
        ({"floor": 0.0}, ValueError, ("floor", "0.0", "above 0")),
        (
            {"confidence": torch.tensor([0.5, NAN, 1, 1])},
            ValueError,
            ("confidence", "nan in position 1", "0 to 1"),
        ),
        (
            {"confidence": torch.tensor([0.5, 1, 3, -1])},
            ValueError,
            ("confidence", "3.0 in position 2 (2", "0 to 1"),
        ),
    ],
)
def test_token_weights_arguments(changes, error, parts):
    arguments = {"confidence": torch.rand(4), "cu_seqlens": torch.tensor([0, 4])} | changes
    refused(token_weights, arguments, error, parts)


@pytest.mark.parametrize(
    ("function", "arguments", "parts"),
    [
        (shift_labels, {"labels": torch.arange(3)}, ("labels", "(3,)", "(any, any)")),
        (
            shift_labels,
            {"labels": torch.zeros(1, 3, dtype=torch.int64), "cu_seqlens": torch.tensor([0, 2])},
            ("cu_seqlens", "2", "3"),
        ),
        (
            cu_seqlens_from_position_ids,
            {"position_ids": torch.arange(3)},
            ("position_ids", "(3,)", "(any, any)"),
        ),
        (
            cu_seqlens_from_attention_mask,
            {"attention_mask": torch.ones(3, dtype=torch.int64)},
            ("attention_mask", "(3,)", "(any, any)"),
        ),
    ],
)
def test_layout_helpers(function, arguments, parts):
    refused(function, arguments, ValueError, parts)


@pytest.mark.parametrize("module", [LinearCrossEntropyLoss, BalancedLinearCrossEntropyLoss])
def test_modules_refuse_unknown_settings(module):
    refused(module, {"softcapp": 3.0}, TypeError, ("softcapp", "unexpected", "softcap"))


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ({"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
        ({"gradient": "x"}, ValueError, ("gradient", "x", "'exact'")),
        ({"max_buffer_bytes": "1"}, TypeError, ("max_buffer_bytes", "str", "int")),
    ],
)
@pytest.mark.parametrize("module", [LinearCrossEntropyLoss, BalancedLinearCrossEntropyLoss])
def test_modules_check_settings_when_made(module, settings, error, parts):
    refused(module, settings, error, parts)


def test_a_balanced_module_checks_its_weighting_when_made():
    arguments = {"scheme": "foo"}
    refused(BalancedLinearCrossEntropyLoss, arguments, ValueError, ("scheme", "foo", "'bft'"))
    arguments = {"window": 0}
    refused(BalancedLinearCrossEntropyLoss, arguments, ValueError, ("window", "0", "at least 1"))


def test_nan_in_an_ignored_row_costs_nothing_and_is_not_reported():
    target = torch.arange(N)
    target[1] = -100
    result = linear_nll(**good(hidden=with_nan((N, D)), target=target, check=True))
    assert bool(torch.isfinite(result).all())


def test_check_false_looks_at_no_boundaries():
    bounds = torch.tensor([0, 4, 2, N])
    loss = balanced_linear_cross_entropy(
        **good(cu_seqlens=bounds, check=False, gradient="sampled", seed=0)
    )
    assert bool(torch.isfinite(loss))


def test_check_false_looks_at_no_values():
    result = linear_nll(**good(hidden=with_nan((N, D)), check=False))
    assert result.isnan().sum() == 1


def test_nan_is_reported_only_when_asked():
    assert linear_nll(**good(hidden=with_nan((N, D)))).isnan().sum() == 1

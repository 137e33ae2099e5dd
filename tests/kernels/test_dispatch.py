"""Which backend runs, what the installation tells of itself, and the module twins."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    dispatch,
    info,
    linear_cross_entropy,
    linear_nll,
)
from tests.support.problems import assert_close, draw_problem


@pytest.fixture
def crippled(monkeypatch):
    """A first choice that never runs, before the real backends."""
    broken = SimpleNamespace(why_not=lambda hidden, weight: ["it is Sunday"])
    monkeypatch.setitem(sys.modules, "bft_kernels.backends.broken", broken)
    monkeypatch.setattr(dispatch, "BACKENDS", ("broken", *dispatch.BACKENDS))


def test_a_forced_backend_that_cannot_run_says_why(crippled):
    p = draw_problem(4, 3, 7)
    assert dispatch.why_not("broken", p.hidden, p.weight) == ["it is Sunday"]
    with pytest.raises(RuntimeError, match=r"backend: got .broken.*it is Sunday"):
        linear_nll(*p.args, backend="broken")


def test_auto_takes_the_first_that_runs(crippled):
    p = draw_problem(4, 3, 7)
    assert_close(linear_nll(*p.args), linear_nll(*p.args, backend="torch"))


def test_auto_says_its_choice_once(caplog):
    dispatch._announce.cache_clear()
    p = draw_problem(4, 3, 7)
    with caplog.at_level(logging.INFO, logger="bft_kernels"):
        for _ in range(3):
            linear_nll(*p.args).sum().backward()
        linear_nll(*p.args, backend="torch")
    assert caplog.messages == ["backend torch for torch.float64 on cpu"]


WIDE, NARROW = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2)
META = torch.empty(2, 2, device="meta")
REASONS = [
    ("torch", NARROW, NARROW.to_sparse(), "weight"),
    ("torch", META, NARROW, "meta"),
    ("cpu", WIDE, WIDE, "hidden is float64, it computes in float32"),
    ("cpu", NARROW, torch.randn(3, 5).t(), "strides (1, 5)"),
    ("cpu", META, NARROW, "hidden is on meta"),
    ("triton", WIDE, WIDE, "hidden is float64, it computes in float32"),
    ("triton", META, META, "hidden is on meta, it takes CUDA tensors"),
    ("cuda", WIDE, WIDE, "hidden is float64, it computes in float32"),
    ("cuda", NARROW.to_sparse(), NARROW, "it takes strided tensors"),
]


@pytest.mark.parametrize(("name", "hidden", "weight", "reason"), REASONS)
def test_reasons_name_the_tensor(name, hidden, weight, reason, request):
    if name == "cuda":
        request.getfixturevalue("emulated_device")
    else:
        pytest.importorskip({"cpu": "bft_kernels._cpu", "torch": "torch"}.get(name, name))
    assert any(reason in said for said in dispatch.why_not(name, hidden, weight))
    if name != "triton":
        assert dispatch.why_not(name, NARROW, NARROW) == []


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="backend: got 'none'"):
        dispatch.why_not("none", NARROW, NARROW)


def test_info_tells_versions_devices_extensions_and_backends():
    facts = info()
    assert facts["versions"]["torch"] == torch.__version__
    assert "cpu" in facts["devices"]
    assert facts["backends"]["torch"]["cpu"] == []
    assert all(text.startswith(("built", "not built")) for text in facts["extensions"].values())
    assert (facts["backends"]["cpu"]["cpu"] == []) == facts["extensions"]["cpu"].startswith("built")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_module_equals_function(reduction):
    p = draw_problem(9, 4, 17, bias=True)
    settings = {"reduction": reduction, "softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1}
    module = LinearCrossEntropyLoss(**settings)
    assert_close(
        module(*p.args, bias=p.bias), linear_cross_entropy(*p.args, bias=p.bias, **settings)
    )
    assert "softcap=5.0" in repr(module)
    assert list(module.parameters()) == []


def test_balanced_module_equals_function():
    p = draw_problem(9, 4, 17)
    settings = {"scheme": "bft-v1", "window": 3, "normalize": "token", "return_stats": True}
    cu_seqlens = torch.tensor([0, 4, 9])
    got = BalancedLinearCrossEntropyLoss(**settings)(*p.args, cu_seqlens=cu_seqlens, num_items=5)
    want = balanced_linear_cross_entropy(*p.args, cu_seqlens=cu_seqlens, num_items=5, **settings)
    assert_close(got[0], want[0])
    assert_close(got[1]._asdict(), want[1]._asdict())

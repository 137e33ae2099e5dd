"""The CUDA backend's own paths, its device code run by the emulation."""

import pytest
import torch

from bft_kernels import linear_nll
from bft_kernels.backends import cuda
from bft_kernels.backends.common import logit_rows, on_device
from bft_kernels.backends.cuda import native
from bft_kernels.dispatch import why_not
from tests.support.problems import assert_close, draw_problem
from tests.support.samples import sampled_options

SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}


def test_says_why_it_does_not_run(monkeypatch):
    p = draw_problem(4, 3, 5, dtype=torch.float32)
    if not torch.cuda.is_available():
        reasons = why_not("cuda", p.hidden, p.weight)
        assert "there is no CUDA device (torch.cuda.is_available() is False)" in reasons
        assert "hidden is on cpu, it takes CUDA tensors" in reasons
        with pytest.raises(RuntimeError, match=r"backend: got 'cuda'.*there is no CUDA device"):
            linear_nll(*p.args, backend="cuda")
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert "bft_kernels._cuda is not built" in why_not("cuda", p.hidden, p.weight)[0]


@pytest.fixture(params=["tiles", "chunks"])
def engine(request, monkeypatch):
    """Of the forward."""
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: request.param == "chunks")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("stored", [(0, 0), (0, 1), (1, 0)], ids=["wide", "weight", "hidden"])
def test_operands_stored_in_another_type(emulated_device, stored, gradient, monkeypatch):
    """Under autocast gradients are of the type that is stored, and rounded to it once."""
    # Rows without room are computed again, by way of a dy that is rounded.
    monkeypatch.setattr(logit_rows, "capacity_for", lambda rows, vocabulary, eps: rows * vocabulary)
    types = torch.float32, torch.bfloat16
    p = draw_problem(21, 12, 180, dtype=torch.bfloat16, scale=2.0)
    how = sampled_options(p) if gradient == "sampled" else {}
    found = []
    for backend, autocast in (("cuda", True), ("torch", False)):
        hidden, weight = (
            x.detach().to(types[kind] if autocast else torch.float32).requires_grad_()
            for x, kind in zip((p.hidden, p.weight), stored, strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll = linear_nll(hidden, weight, p.target, backend=backend, **how)
        (nll * torch.linspace(0.5, 2, 21)).sum().backward()
        found.append((hidden.grad, weight.grad))
    for got, want, kind in zip(*found, stored, strict=True):
        assert got.dtype == types[kind]
        # An exact dy is rounded before its products.
        assert_close(got, want, 1e-5 if how and kind == 0 else 2**-6)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
def test_a_frozen_head_has_no_work_for_dw(emulated_device, frozen):
    p = draw_problem(9, 6, 40, bias=True, dtype=torch.float32, frozen=frozen)
    emulated_device.launches.clear()
    linear_nll(*p.args, bias=p.bias, backend="cuda", **SAMPLED).sum().backward()
    assert ("sort_entries" in emulated_device.launches) == (not frozen)
    assert ("weight_gradient" in emulated_device.launches) == (not frozen)


@pytest.mark.usefixtures("engine")
def test_rows_too_wide_to_gather_are_computed_again(emulated_device, monkeypatch):
    p = draw_problem(21, 12, 180, dtype=torch.float32, scale=2.0)
    how, grads = sampled_options(p), []
    for widest in (native.kernels().MAX_GATHERED, 11):
        monkeypatch.setattr(emulated_device.module, "MAX_GATHERED", widest)
        emulated_device.launches.clear()
        copy = p.copy()
        linear_nll(*copy.args, backend="cuda", **how).sum().backward()
        assert ("spmm_hidden" in emulated_device.launches) == (widest > 11)
        grads.append(copy.grads())
    assert_close(grads[1], grads[0], 1e-5)


def test_an_address_keeps_no_tensor_alive(emulated_device):
    """Where an argument is made in the call itself, a launch would use memory of another."""
    gone = native.out(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(AssertionError, match="starts_ptr: the tensor is gone before the launch"):
        native._cuda.column_starts(sorted_keys_ptr=0, E=0, V=3, starts_ptr=gone, stream=0)

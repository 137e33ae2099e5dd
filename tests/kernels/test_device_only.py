"""No op makes or copies a tensor on the host, or waits for the device: a CUDA graph may hold it.

There need be no GPU; see ``tests/support/meta_device.py``.
"""

import functools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bft_kernels import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    ops,
    token_weights,
)
from bft_kernels.backends.torch.engine import linear_nll as torch_linear_nll
from bft_kernels.problem import Problem
from bft_kernels.results import Wanted
from bft_kernels.settings import Settings
from bft_kernels.weighting import _call_scheme
from tests.support.meta_device import VOCABULARY, WIDTH, Device, FromHost, HostWork, put_under

ROWS, LENGTH = 3, 8


@pytest.fixture(params=["triton", "cuda", "torch"])
def device(request, monkeypatch):
    return put_under(request.param, request, monkeypatch)


def attached(**how):
    nll, stats = linear_nll(**how, differentiable=("lse", "entropy"))
    return nll + stats.lse + stats.entropy


def class_weighted(weight, **how):
    how |= {"class_weight": weight.detach()[:, 0], "label_smoothing": 0.1}
    return linear_cross_entropy(weight=weight, **how)


LOSSES = {
    "nll": linear_nll,
    "nll, attached": attached,
    "nll, top k": functools.partial(linear_nll, top_k=3),
    "nll, statistics": functools.partial(linear_nll, return_stats=True),
    "sum": functools.partial(linear_cross_entropy, reduction="sum"),
    "mean": linear_cross_entropy,
    "mean, smoothed": functools.partial(linear_cross_entropy, label_smoothing=0.1, z_loss=1e-4),
    "mean, smoothed, class weights": class_weighted,
    "mean, smoothed, class weights, softcap": functools.partial(class_weighted, softcap=9.0),
    "none": functools.partial(linear_cross_entropy, reduction="none"),
    "sft": functools.partial(balanced_linear_cross_entropy, scheme="sft"),
    "dft, tokens": functools.partial(
        balanced_linear_cross_entropy, scheme="dft", normalize="token"
    ),
    "bft": balanced_linear_cross_entropy,
    "bft, statistics": functools.partial(balanced_linear_cross_entropy, return_stats=True),
    "bft-v1-code, tokens, items": functools.partial(
        balanced_linear_cross_entropy, scheme="bft-v1-code", normalize="token", num_items=7
    ),
}
BALANCED = [name for name in LOSSES if name.startswith(("sft", "dft", "bft"))]
EXACT = ("nll, attached", *[name for name in LOSSES if "smoothed" in name])
FROZEN = {"trained head": (), "frozen head": ("weight", "bias")}
BUDGETS = {"a chunk": None, "chunks": 6 * VOCABULARY * 4}
SAMPLED = {"gradient": "sampled", "eps": 2**-5}


@pytest.fixture(params=FROZEN)
def frozen(request):
    return FROZEN[request.param]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", LOSSES)
def test_exact_losses_keep_to_the_device(device, name, budget, frozen):
    p = device.problem((ROWS, LENGTH), frozen)
    work = device.run(lambda: LOSSES[name](**p, max_buffer_bytes=BUDGETS[budget]))
    assert not work.made + work.copied + work.own
    assert device.launched or device.backend == "torch"
    assert p["hidden"].grad is not None
    assert (p["weight"].grad is not None) == (not frozen)


@pytest.mark.parametrize(("budget", "seed"), [("a chunk", None), ("chunks", 7)])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in EXACT])
@pytest.mark.parametrize("device", ["triton", "cuda"], indirect=True)  # torch waits: see below
def test_sampled_losses_keep_to_the_device(device, name, budget, seed, frozen):
    p = device.problem((ROWS, LENGTH), frozen)
    how = {**SAMPLED, "seed": seed, "max_buffer_bytes": BUDGETS[budget]}
    if "statistics" in name:
        how["hidden_variance"] = True
    work = device.run(lambda: LOSSES[name](**p, **how))
    assert not work.made + work.copied + work.own
    assert p["hidden"].grad is not None


@pytest.mark.parametrize("name", BALANCED)
def test_boundaries_on_the_device_stay_there(device, name, frozen):
    p = device.problem((ROWS * LENGTH,), frozen)
    cu_seqlens = device.tensor(5, dtype=torch.int32)
    work = device.run(lambda: LOSSES[name](**p, cu_seqlens=cu_seqlens))
    assert not work.made + work.copied + work.own


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", BALANCED)
def test_boundaries_on_the_host_are_copied_once(device, name, budget, frozen):
    """The host may read what the caller has there; documents fit the chunks, or do not."""
    p = device.problem((ROWS * LENGTH,), frozen)
    cu_seqlens = torch.tensor([0, 0, 3, 16, 16, 24])
    how = {"cu_seqlens": cu_seqlens, "max_buffer_bytes": BUDGETS[budget]}
    work = device.run(lambda: LOSSES[name](**p, **how))
    needed = name != "dft, tokens"
    assert work.copied == ["aten._to_copy.default"] * needed
    assert not work.made


@pytest.mark.parametrize("length", [0, 1, 8])
def test_rows_are_planned_from_the_shape(length):
    device = Device("")
    hidden = device.tensor(ROWS * length, WIDTH)
    cu_seqlens = device.tensor(ROWS + 1, dtype=torch.int64)
    found = ops._documents_on_host(cu_seqlens, None, hidden)
    assert found.cu_seqlens is cu_seqlens
    assert found.bounds == [0, length, 2 * length, 3 * length]


def test_weights_by_themselves_keep_to_the_device():
    device = Device("")
    confidence = device.tensor(30, dtype=torch.float32)
    with device.work as work:
        for scheme in ("dft", "bft", "bft-v1-code"):
            token_weights(confidence, device.tensor(4, dtype=torch.int64), scheme=scheme)
    assert not work.made + work.copied + work.own


# --- while a CUDA graph is captured -------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    """A problem on a GPU that captures, as far as the host can tell."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield {
            "hidden": torch.empty(ROWS, LENGTH, WIDTH, device="cuda"),
            "weight": torch.empty(VOCABULARY, WIDTH, device="cuda"),
            "target": torch.empty(ROWS, LENGTH, dtype=torch.int64, device="cuda"),
        }


BOUNDS = torch.tensor([0, 9, ROWS * LENGTH])


def captured_call(captured, **options):
    hidden, weight, target = captured.values()
    seed = torch.empty((), dtype=torch.int64, device=hidden.device)
    settings = Settings(eps=2**-5, backend="torch", max_buffer_bytes=2**20, **options)
    wanted = Wanted(True, True, False)
    return Problem(hidden, weight, target, None, seed, settings, hidden.dtype, wanted)


def test_a_capture_takes_what_lies_on_the_device(captured):
    balanced_linear_cross_entropy(**captured, num_items=3)


@pytest.mark.parametrize("how", [{}, {"gradient": "sampled"}, {"scheme": "sft"}], ids=str)
def test_a_capture_refuses_boundaries_on_the_host(captured, how):
    with pytest.raises(
        RuntimeError, match=r"^cu_seqlens: got a tensor on cpu .* captured, .* Move"
    ):
        balanced_linear_cross_entropy(**captured, cu_seqlens=BOUNDS, **how)


def test_a_captured_op_refuses_boundaries_on_the_host(captured):
    """Compiled code is captured with the copy outside the op."""
    count, device = ROWS * LENGTH, captured["hidden"].device
    share, cu_seqlens = torch.empty(count, device=device), BOUNDS.to(device)
    call = captured_call(captured)
    tensors = share, cu_seqlens, BOUNDS, *captured.values(), None, None
    with pytest.raises(RuntimeError, match=r"^cu_seqlens: got a tensor on the CPU while .* Move"):
        ops.weighted_loss_op._init_fn(*tensors, *call.arguments("weighted"))


def test_a_capture_refuses_a_count_on_the_host(captured):
    labelled = captured["target"] > 0
    with pytest.raises(RuntimeError, match=r"^num_items: got a tensor on cpu while .* a number"):
        ops.num_items._init_fn(torch.tensor(3), labelled, False)


@pytest.mark.parametrize("function", [linear_nll, balanced_linear_cross_entropy])
def test_a_capture_refuses_checks_of_values(captured, function):
    with pytest.raises(RuntimeError, match=r"^check: got True while .* None or False"):
        function(**captured, check=True)


def test_a_capture_refuses_a_callable(captured):
    def scheme(confidence, cu_seqlens):
        raise AssertionError("not called")

    confidence = torch.empty(9, device=captured["hidden"].device)
    with pytest.raises(RuntimeError, match=r"^scheme: got a callable while .* a name"):
        _call_scheme(scheme, confidence, BOUNDS, confidence)


def test_a_capture_refuses_lists_of_unknown_length(captured):
    with pytest.raises(RuntimeError, match=r"^gradient: got 'sampled' with backend='torch'"):
        torch_linear_nll(captured_call(captured, gradient="sampled"))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.tensor([0, 3], device=x.device),
        lambda x: torch.as_tensor([0, 3], device=x.device),
        lambda x: x.new_tensor([0, 3]),
        lambda x: x[[0, 1]],
        lambda x: x[:, np.array([0, 1])],
        lambda x: x.index_copy_(0, torch.tensor([0]).to(x.device), x[:1]),
    ],
)
def test_values_of_the_host_are_seen(made):
    x = torch.empty(4, 4, device="meta")
    with HostWork(), FromHost(), pytest.raises(AssertionError, match="a tensor of the host's"):
        made(x)

"""The small call that a backend makes before its first on a GPU, and what becomes of its errors.

No GPU is needed: what a GPU lacks raises here as it would there, most of it because it is true of a
CPU, too.
"""

import functools
import importlib
import importlib.util
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bft_kernels import dispatch, info, linear_nll, ops
from bft_kernels.backends.common import trial as products
from bft_kernels.backends.cuda import native
from bft_kernels.backends.torch import engine
from bft_kernels.problem import Traits
from bft_kernels.settings import Settings
from tests.support.problems import draw_problem

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU makes real calls")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing was tried or said before."""
    for name in ("try_out", "_warn", "_announce"):
        function = getattr(dispatch, name).__wrapped__
        monkeypatch.setattr(dispatch, name, functools.cache(function))
    monkeypatch.setattr(dispatch, "_tried", set())


def tried(name, operand=torch.bfloat16):
    """The error of a backend's small call, made on the CPU."""
    return dispatch.try_out(name, CPU, operand)


@pytest.mark.parametrize("operand", HALF, ids=str)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_products_that_torch_does_not_have(name, operand):
    """As on AMD before torch 2.10: no half product of a CPU has a float32 result."""
    if name == "triton":
        pytest.importorskip("triton")
    assert tried(name, operand).startswith("a small call on cpu in ")
    assert "aten::mm.dtype" in tried(name, operand)
    assert tried("torch", torch.float32) == tried("torch", None) == ""


def test_a_torch_without_the_argument(monkeypatch):
    def mm(a, b, *, out=None):
        raise AssertionError("is not reached")

    monkeypatch.setattr(torch, "mm", mm)
    assert "TypeError" in tried("torch")
    assert "out_dtype" in tried("torch")


@pytest.fixture
def wide_products(monkeypatch):
    """Half products with a float32 result, as a GPU has them."""
    monkeypatch.setattr(products, "try_out", lambda device, operand: None)


@needs_triton
@pytest.mark.parametrize("operand", [*HALF, torch.float32, None], ids=str)
def test_the_kernels_give_a_loss(operand, wide_products):
    trial = importlib.import_module("bft_kernels.backends.triton.trial")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = trial.losses_of_ones(device, operand)
    torch.testing.assert_close(loss.cpu(), torch.full((2,), math.log(32)))
    assert dispatch.try_out("triton", device, operand) == ""


@without_gpu
@needs_triton
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler. Please specify"), "Failed to find C compiler"),
        ("shared memory", "Required: 99000, Hardware limit: 65536"),
    ],
    ids=["no compiler", "no shared memory"],
)
def test_a_kernel_that_cannot_be_launched(error, said, wide_products, monkeypatch):
    from triton.runtime.errors import OutOfResources
    from triton.runtime.interpreter import GridExecutor

    def launch(*args, **how):
        raise error if isinstance(error, Exception) else OutOfResources(99000, 65536, error)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    assert said in tried("triton")


def test_the_cuda_backend_makes_a_loss_and_its_gradients(emulated_device, wide_products):
    for operand in (*HALF, torch.float32, None):
        emulated_device.launches.clear()
        assert tried("cuda", operand) == ""
        assert {"linear_nll_forward", "weight_gradient"} <= set(emulated_device.launches)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("linear_nll_forward: the CUDA launch failed: cudaErrorNoKernelImageForDevice"),
        RuntimeError("linear_nll_forward: the CUDA launch failed: cudaErrorInsufficientDriver"),
        ImportError("libcudart.so.14: cannot open shared object file"),
    ],
    ids=["another GPU", "an old driver", "no library"],
)
def test_a_module_that_was_built_for_others(error, emulated_device, wide_products, monkeypatch):
    def kernels():
        raise error

    monkeypatch.setattr(native, "kernels", kernels)
    assert tried("cuda").endswith(f"{type(error).__name__}: {error}")


@without_gpu
def test_a_gpu_that_is_not_there():
    probe = Traits(torch.device("cuda", 0), torch.bfloat16)
    (reason,) = dispatch.why_not("torch", probe, probe)
    assert reason.startswith("a small call on cuda:0 in bfloat16 failed: ")


@pytest.fixture
def made(monkeypatch):
    """The small calls of backends that take tensors of a CPU for those of a GPU; `cpu`'s fails."""
    calls = []

    def try_out(name, device, operand):
        calls.append((name, operand))
        return "no image" if name == "cpu" else ""

    monkeypatch.setattr(dispatch, "try_out", try_out)
    monkeypatch.setattr(dispatch, "BACKENDS", ("cpu", "torch"))
    for name in dispatch.BACKENDS:
        package = dispatch.backend_package(name)
        monkeypatch.setattr(package, "why_not", lambda hidden, weight: [])
    why_tried = dispatch._why_tried
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "_why_tried", lambda one, device, how: why_tried(one, gpu, how))
    return calls


def test_auto_warns_once_and_takes_the_next(made, caplog):
    p = draw_problem(4, 3, 7, dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="bft_kernels"):
        for _ in range(3):
            linear_nll(*p.args).sum().backward()
    assert caplog.messages == ["backend cpu is not used: no image"]


def test_a_backend_that_was_asked_for_raises_with_the_error(made, caplog):
    p = draw_problem(4, 3, 7, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"backend: got 'cpu', which cannot run.*no image"):
        linear_nll(*p.args, backend="cpu")
    assert not caplog.records


def test_what_is_tried_is_the_type_of_the_products(made):
    p = draw_problem(4, 3, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        linear_nll(*p.args, backend="torch")
    assert made == [("torch", torch.bfloat16)]


def test_a_choice_made_while_a_graph_is_captured_is_not_remembered(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    probe = Traits(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(ops, "traits_of", lambda tensor: probe)
    how = {"operand": probe.dtype, "settings": Settings(), "adapter": None}
    problem = SimpleNamespace(hidden=None, weight=None, **how)
    for capturing, name in ((True, "cpu"), (False, "torch"), (True, "torch")):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        expected = dispatch.engine(name)
        assert ops._engine(problem) is expected
        assert dispatch.offered("linear_nll", "auto", probe) is expected.linear_nll


def test_a_call_is_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr(engine, "try_out", lambda device, operand: calls.append(operand))
    for _ in range(3):
        assert tried("torch") == ""
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("none left"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_no_memory_is_no_reason(error, monkeypatch):
    def full(device, operand):
        raise error

    monkeypatch.setattr(engine, "try_out", full)
    with pytest.raises(type(error)):
        tried("torch")
    info_module = importlib.import_module("bft_kernels.installation")
    monkeypatch.setattr(info_module, "why_not", lambda *_: tried("torch"))
    (reason,) = info_module._reasons(info_module.BACKENDS[0], "cpu")
    assert reason == f"not tried: {error}"


def test_settings_of_precision_do_not_count(monkeypatch):
    """Torch refuses half products with a float32 result where sums may be float16."""
    matmul, seen = torch.backends.cuda.matmul, []
    monkeypatch.setattr(engine, "try_out", lambda *_: seen.append(matmul.allow_fp16_accumulation))
    matmul.allow_fp16_accumulation = True
    try:
        tried("torch")
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False
    assert seen == [False]


class Devices(TorchFunctionMode):
    """The devices on which tensors are made."""

    def __init__(self):
        super().__init__()
        self.used = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.used.add(str(kwargs.get("device", "cpu")))
        return func(*args, **kwargs)


@without_gpu
def test_info_uses_no_gpu_but_the_current_one(monkeypatch):
    """A context is hundreds of MiB on each GPU it is opened on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with Devices() as devices:
        facts = info()
    assert list(facts["devices"]) == ["cpu", "cuda:0", "cuda:1", "cuda:2"]
    assert devices.used <= {"cpu", "cuda:1"}
    reasons = facts["backends"]["torch"]
    assert reasons["cuda:0"] == reasons["cuda:2"] == []
    assert reasons["cuda:1"][0].startswith("a small call on cuda:1 in float32 failed")
    assert "it takes tensors on the CPU" in facts["backends"]["cpu"]["cuda:2"][0]

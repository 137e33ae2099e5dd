"""Settings of torch's products are the caller's: no loss may depend on them, or change them."""

import threading
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bft_kernels import balanced_linear_cross_entropy, linear_nll, precision
from tests.support.problems import draw_problem

BACKENDS = torch.backends
NEW = hasattr(BACKENDS, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="fp32_precision came with torch 2.9")
SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}


def state():
    """All that a caller may have set, as far as torch lets it be read."""
    reads = {
        "matmul precision": torch.get_float32_matmul_precision,
        "allow_tf32": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "float16 sums": lambda: BACKENDS.cuda.matmul.allow_fp16_accumulation,
    }
    if NEW:
        for name in ("", "cudnn", "cuda.matmul", "mkldnn", "mkldnn.matmul"):
            place = BACKENDS
            for part in name.split(".") if name else ():
                place = getattr(place, part)
            reads[f"{name}.fp32_precision"] = lambda place=place: place.fp32_precision
    found = {}
    for name, read in reads.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = str(error)
    return found


@pytest.fixture(autouse=True)
def defaults():
    """Whatever a test sets is gone after it."""
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cuda.matmul.allow_fp16_accumulation = False
    if NEW:
        for place in (BACKENDS, BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul):
            place.fp32_precision = "none"


def new_name(*places, value):
    def apply():
        for name in places:
            getattr(BACKENDS, name).matmul.fp32_precision = value

    return apply


def everywhere(value):
    BACKENDS.fp32_precision = value


def old_then_new():
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


SETTINGS = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "float16 sums": lambda: setattr(BACKENDS.cuda.matmul, "allow_fp16_accumulation", True),
    "cuda tf32": pytest.param(new_name("cuda", value="tf32"), marks=needs_new),
    "mkldnn bf16": pytest.param(new_name("mkldnn", value="bf16"), marks=needs_new),
    "both tf32": pytest.param(new_name("cuda", "mkldnn", value="tf32"), marks=needs_new),
    "all tf32": pytest.param(lambda: everywhere("tf32"), marks=needs_new),
    "all bf16": pytest.param(lambda: everywhere("bf16"), marks=needs_new),
    "old and new": pytest.param(old_then_new, marks=needs_new),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


class Watch(TorchFunctionMode):
    """The settings at each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("mm", "addmm", "addmm_", "matmul", "__matmul__"):
            self.seen.append(state())
        return func(*args, **(kwargs or {}))


def grads(p, backend, loss):
    own = p.copy()
    if loss == "balanced":
        value = balanced_linear_cross_entropy(*own.args, window=4, backend=backend)
    else:
        value = linear_nll(*own.args, backend=backend, **(SAMPLED if loss == "sampled" else {}))
    value.sum().backward()
    return [value.detach(), own.hidden.grad, own.weight.grad]


@pytest.mark.parametrize("loss", ["exact", "sampled", "balanced"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@every_setting
def test_float32_is_float32(setting, backend, loss, backend_under):
    """Bits, where this processor has a faster product; elsewhere what the product would look at."""
    p = draw_problem(40, 96, 300, dtype=torch.float32)
    want = grads(p, backend, loss)
    setting()
    before = state()
    watch = Watch()
    backend_under(watch)
    got = grads(p, backend, loss)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert state() == before
    assert watch.seen
    for seen in watch.seen:
        assert not seen["float16 sums"]
        if NEW:
            assert seen["cuda.matmul.fp32_precision"] in ("none", "ieee")
            assert seen["mkldnn.matmul.fp32_precision"] in ("none", "ieee")
        else:
            assert seen["matmul precision"] == "highest"


@every_setting
def test_the_old_names_can_be_read_meanwhile(setting):
    """The profiler reads one of them at every op."""
    setting()
    readable = {name: not str(value).startswith("PyTorch is") for name, value in state().items()}
    with precision.own_settings(torch.zeros(1)):
        during = state()
    for name, was in readable.items():
        assert not (was and str(during[name]).startswith("PyTorch is")), name


@every_setting
def test_settings_are_restored_after_an_error(setting):
    setting()
    before = state()
    with pytest.raises(KeyError), precision.own_settings(torch.zeros(1)):
        raise KeyError
    assert state() == before


@needs_new
def test_what_was_inherited_still_follows():
    everywhere("tf32")
    with precision.own_settings(torch.zeros(1)):
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    everywhere("none")
    assert BACKENDS.cuda.matmul.fp32_precision == "none"
    assert BACKENDS.mkldnn.matmul.fp32_precision == "none"


def test_threads_that_overlap_restore_what_the_caller_set():
    torch.set_float32_matmul_precision("high")
    before, entered, leave = state(), threading.Event(), threading.Event()

    def other():
        with precision.own_settings(torch.zeros(1)):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with precision.own_settings(torch.zeros(1)):
        thread.start()
        assert entered.wait(10)
    during = state()
    leave.set()
    thread.join()
    assert during["matmul precision"] == "highest"  # the other one is still inside
    assert state() == before


def test_before_torch_2_9(monkeypatch):
    """One name for all of it."""
    old = types.SimpleNamespace(cuda=BACKENDS.cuda)
    monkeypatch.setattr(torch, "backends", old)
    torch.set_float32_matmul_precision("medium")
    with precision.own_settings(torch.zeros(1)):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"

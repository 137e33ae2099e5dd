"""A device without values under a backend: what the host does there, and how often, can be seen.

Tensors lie on the ``meta`` device, the ops' own bodies run on them below autograd, and kernels that
would be launched only look at where their arguments lie.
"""

import contextlib
import importlib
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bft_kernels import ops
from bft_kernels.backends.cuda import inputs, native

WIDTH, VOCABULARY = 16, 300
OPS = [op for op in vars(ops).values() if isinstance(op, torch.library.CustomOpDef)]
BODIES = {op._opoverload: op._init_fn for op in OPS}


class FromHost(TorchFunctionMode):
    """Refuses what makes a tensor of the host's values: on a GPU they are copied there.

    On this device such a call leaves no other trace.
    """

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)
    INDEXED = (Tensor.__getitem__, Tensor.__setitem__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        listed = func in self.INDEXED and any(
            isinstance(index, list | np.ndarray)
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if func in self.MAKERS or listed:
            raise AssertionError(f"{func.__name__}: a tensor of the host's values")
        return func(*args, **kwargs or {})


class HostWork(TorchDispatchMode):
    """Runs the ops' bodies and notes what is done with tensors on the host."""

    def __init__(self):
        super().__init__()
        self.made = []  # on the host, from nothing there
        self.copied = []  # from one to the other
        self.own = []  # host tensors from host tensors
        self.operators = Counter()  # of torch, by name, but for those that only look at a tensor
        self.bytes = 0  # of the tensors that these operators read and write

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BODIES:
            with self, FromHost():
                return BODIES[func](*args, **kwargs)
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func is torch.ops.aten._local_scalar_dense.default and given != {"cpu"}:
            raise AssertionError("the host reads a value of the device")
        result = func(*args, **kwargs)
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if func._schema.is_mutable or not shares_memory(result, (args, kwargs)):
            self.operators[str(func)] += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        if "cpu" in given | made:
            alone = given | made == {"cpu"}
            new = not given or func is torch.ops.aten.lift_fresh.default
            (self.copied if not alone else self.made if new else self.own).append(str(func))
        return result


def shares_memory(result, given):
    """Whether each tensor of a result lies in the memory of one that was given: a view, or it."""
    known = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)}
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return all(x.untyped_storage()._cdata in known for x in made)


@dataclass
class Device:
    """Stands for an accelerator under a backend."""

    backend: str
    work: HostWork = field(default_factory=HostWork)
    launched: int = 0  # kernels

    def tensor(self, *shape, grad=False, dtype=None):
        dtype = dtype or torch.bfloat16
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)

    def launch(self, *arguments, **named):
        """Of a kernel: all that it reads and writes must be there."""
        found = {x.device.type for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)}
        assert found == {"meta"}
        self.launched += 1

    def run(self, loss):
        """What a loss and its backward do with the host."""
        with self.work, FromHost():
            value = loss()
            (value if isinstance(value, Tensor) else value[0]).sum().backward()
        return self.work

    def problem(self, shape, frozen=()):
        """Arguments that a loss takes."""
        return {
            "hidden": self.tensor(*shape, WIDTH, grad="hidden" not in frozen),
            "weight": self.tensor(VOCABULARY, WIDTH, grad="weight" not in frozen),
            "target": self.tensor(*shape, dtype=torch.int64),
            "bias": self.tensor(VOCABULARY, grad="bias" not in frozen),
        }


@dataclass
class Launches:
    """``bft_kernels._cuda``, whose launches do nothing but count."""

    module: ModuleType
    device: Device

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if isinstance(value, type):
            return lambda **_: None
        is_launch = "stream" in (getattr(value, "__doc__", None) or "")
        return self.count if is_launch else value

    def count(self, **_):
        self.device.launched += 1

    @staticmethod
    def address(x, *, writable):
        assert x is None or x.device.type == "meta"
        return 0


def put_under(backend, request, monkeypatch):
    """Runs a backend on such a device, until the test ends."""
    device = Device(backend)
    # There is none for this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        for kind in (InterpretedFunction, JITFunction):
            monkeypatch.setattr(kind, "run", lambda _, *args, **named: device.launch(args, named))
    if backend == "cuda":
        module = Launches(request.getfixturevalue("emulated"), device)
        monkeypatch.setattr(native, "kernels", lambda: module)
        monkeypatch.setattr(native, "address", module.address)
        monkeypatch.setattr(native, "DEVICE", "cpu")  # it has no stream
        monkeypatch.setattr(inputs, "processors", lambda _: 132)
    implementation = importlib.import_module(f"bft_kernels.backends.{backend}.engine")
    monkeypatch.setattr(ops, "select", lambda *_: implementation)
    if backend != "torch":
        monkeypatch.setattr(ops, "offered", lambda *_: implementation.balanced_loss)
    return device

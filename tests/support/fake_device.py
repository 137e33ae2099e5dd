"""A device that is none: what a GPU would refuse is refused here, on a CPU."""

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves, tree_map

# Of the CPU's type, so that kernels are interpreted or emulated there; torch has no such index.
NAME = "cpu:7"
_DEVICE = torch.device(NAME)
_CPU = torch.device("cpu")

# Copy between devices. (An index on the CPU is copied to what it selects from.)
_COPY = {"copy_", "to", "cpu", "type", "__getitem__", "__setitem__"}
# Give the host the values themselves, without a copy.
_HOST_ONLY = {"numpy", "__array__"}


def is_there(x):
    """Whether a tensor is on the device."""
    return isinstance(x, Tensor) and getattr(x, "_on_fake_device", False)


def _put(x, there):
    if isinstance(x, Tensor):
        x._on_fake_device = there
    return x


class FakeDevice(TorchFunctionMode):
    """Remembers which tensors were put on the device; refuses functions that mix them with others.

    What comes of tensors there is there. A tensor without dimensions may be anywhere, as torch has
    it. Inside an op nothing is looked at: it is entered with real tensors.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.device:
            return _DEVICE if is_there(args[0]) else func(*args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(map(is_there, tensors))
        if there and not isinstance(func, torch._ops.OpOverload):
            self._refuse(name, tensors)
        asked = [x for x in tree_leaves((args, kwargs)) if _names_device(x)]
        result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        if name == "cpu" or asked:
            there = name != "cpu" and any(torch.device(x) == _DEVICE for x in asked)
            if isinstance(result, Tensor) and any(result is x for x in tensors):
                result = result if is_there(result) == there else result.clone()
        if name.endswith("_") and not name.endswith("__"):
            return result  # itself, wherever it is
        return tree_map(lambda x: _put(x, there), result)

    def _refuse(self, name, tensors):
        if name in _HOST_ONLY:
            raise TypeError(f"{name}: can't convert a tensor on a device; use Tensor.cpu() first")
        if name in _COPY and (is_there(tensors[0]) or name == "copy_"):
            return
        elsewhere = [x for x in tensors if x.dim() and not is_there(x)]
        if elsewhere and any(x.dim() and is_there(x) for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors on the same device, got two devices")


def refuse_in_kernels(monkeypatch):
    """Makes Triton's interpreter refuse what a launch would: any tensor that is elsewhere."""
    if importlib.util.find_spec("triton") is None:
        return
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    launch = executor.__call__

    def checked(self, *args, **kwargs):
        if isinstance(_get_current_function_mode(), FakeDevice):
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and not is_there(x):
                    raise ValueError("a pointer that Triton cannot access: a tensor of the CPU")
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", checked)


def _names_device(x):
    if isinstance(x, str):
        return x == "cpu" or x == NAME
    return isinstance(x, torch.device)


def _real(x):
    return _CPU if _names_device(x) and torch.device(x) == _DEVICE else x

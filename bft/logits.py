"""The logits of an evaluated batch, which are computed when something reads them.

A trainer asks a model for its loss and its logits in one call. It reads the logits only where it
has metrics to compute, or predictions to return.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bft.head import LogitTransform

# What can be told of logits that are not there yet.
_FIELDS = ("shape", "dtype", "device", "ndim", "is_nested", "requires_grad")
_KNOWN = {Tensor.dim, Tensor.numel, Tensor.size, *(getattr(Tensor, f).__get__ for f in _FIELDS)}


class DeferredLogits(Tensor):
    """A tensor ``[B, T, V]`` whose numbers are computed by the first operation that reads them.

    Until then it holds the hidden states ``[B, T, D]`` in their place. What an operation returns is
    an ordinary tensor.
    """

    _compute: Callable[[], Tensor] | None
    _numbers: Tensor | None

    @staticmethod
    def __new__(
        cls: Any,
        outer: nn.Module,
        head: nn.Module,
        hidden: Tensor,  # [B, T, D]
        vocabulary: int,
        transform: LogitTransform,
        on_read: Callable[[Tensor], None],
    ) -> "DeferredLogits":
        """The logits of ``outer``, whose weight is that of ``head``, as they are now.

        ``on_read`` is called with them, once.
        """
        device, weight = hidden.device, cast(Tensor, head.weight)
        autocast = torch.is_autocast_enabled(device.type)
        narrow = torch.get_autocast_dtype(device.type)
        # accelerate's mixed precision makes narrow outputs float32, and would read these for that.
        dtype = torch.float32 if autocast else hidden.dtype
        version = None if weight.is_inference() else weight._version

        def compute() -> Tensor:
            if head.weight is weight and version is not None and weight._version != version:
                raise RuntimeError(
                    "logits: the head's weight has changed since the call that returned them; "
                    "read an evaluation's logits before the next step"
                )
            with torch.no_grad(), torch.autocast(device.type, narrow, enabled=autocast):
                logits = transform(outer(hidden)).to(dtype)
            on_read(logits)
            return logits

        shape = (*hidden.shape[:-1], vocabulary)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute, self._numbers = compute, None
        return self

    def read(self) -> Tensor:
        """The logits; the hidden states are let go."""
        if self._numbers is None:
            assert self._compute is not None
            self._numbers, self._compute = self._compute(), None
        return self._numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # for callers in C++

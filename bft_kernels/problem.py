"""One call of the loss: it is made and checked once, and every layer hands it on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bft_kernels.checks import FLOAT_DTYPES, check_tensor, check_waiting
from bft_kernels.documents import shift_labels
from bft_kernels.results import Wanted
from bft_kernels.settings import SCHEMA as SETTINGS_SCHEMA
from bft_kernels.settings import TAKEN, Settings, check_settings, options_of, values_of
from bft_kernels.values import check_int

CPU_BUFFER_BYTES = 64 * 2**20
# 512 MiB of logits, and a bit for each.
ACCELERATOR_BUFFER_BYTES = 528 * 2**20
# The default of a device with more than LARGE_MEMORY_BYTES in all, however much of it is free. The
# exact ``dW`` goes through float32 memory once a chunk, and a larger budget makes fewer chunks.
LARGE_ACCELERATOR_BUFFER_BYTES = 2 * 2**30
LARGE_MEMORY_BYTES = 40 * 2**30
NARROW_TARGETS = (torch.int32, torch.uint8)  # taken as int64

_DEFAULTS = values_of(Settings())


@dataclass(frozen=True)
class Problem:
    """The flattened tensors of a call, its settings, and the gradients that it needs.

    With a low-rank adapter ``(a, b)`` of the head, ``hidden`` is ``[hidden | a]``, and the matrix
    that it is multiplied with is ``[weight | b]``, which is never put together.
    """

    hidden: Tensor  # [N, D], or [N, D + r]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    bias: Tensor | None  # [V]
    seed: Tensor | None  # [] int64, for the sampled gradient
    settings: Settings
    # The type that operands of GEMMs are rounded to. Sums are in acc_dtype.
    operand: torch.dtype
    wanted: Wanted  # gradients to prepare in a forward, or to make in a backward
    adapter: Tensor | None = None  # [V, r]

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """``N``, ``V``, ``D``; ``D + r`` with an adapter."""
        count, width = self.hidden.shape
        return count, self.weight.shape[0], width

    @property
    def acc_dtype(self) -> torch.dtype:
        """The type of sums: float64 for float64, float32 for everything narrower."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def trains_head(self) -> bool:
        """Whether a gradient of ``weight``, ``bias`` or ``adapter`` is wanted."""
        return any(self.wanted[1:])

    @functools.cached_property
    def saved(self) -> str:
        """What the forward keeps for the backward.

        ``none``: it keeps nothing, since no gradient is wanted. ``recompute``: it keeps lse to
        twice the precision, and the logits are computed again (exact, 4G). ``unit``: it keeps
        ``dH`` for unit upstream gradient (exact with a frozen head, 2G; of the loss alone).
        ``entries``: it keeps the sparse sample of ``dy`` (sampled, 1G).
        """
        if not any(self.wanted):
            return "none"
        if self.settings.gradient == "sampled":
            return "entries"
        trains_head = any(self.wanted[1:])
        return "recompute" if trains_head or self.settings.differentiable else "unit"

    @property
    def statistics(self) -> bool:
        """Whether entropy and correct are wanted."""
        return self.settings.return_stats

    @property
    def variance(self) -> bool:
        """Whether the certificate of the sampled gradient is wanted."""
        return self.settings.return_stats and self.settings.gradient == "sampled"

    @property
    def hidden_variance(self) -> bool:
        """Whether the certificate of ``dH`` is wanted."""
        return self.settings.return_stats and self.settings.hidden_variance

    @property
    def buffer_bytes(self) -> int:
        """The byte budget of blocks of logits."""
        return self.settings.max_buffer_bytes or default_buffer_bytes(self.hidden.device)

    @property
    def labelled(self) -> Tensor:
        """``[N]`` bool: which tokens are not ignored. Each access computes it."""
        # A cached_property takes a lock in Python 3.11, which torch.compile cannot trace.
        return self.target != self.settings.ignore_index

    def arguments(self, op: str) -> list[Any]:
        """An op's arguments that are not tensors, in the order of :data:`SCHEMA`."""
        if torch.compiler.is_compiling():  # a getter of attributes cannot be traced
            return [getattr(self.settings, x) for x in TAKEN[op]] + [self.operand, *self.wanted]
        return [*options_of[op](self.settings), self.operand, *self.wanted]


# By op: the part of its schema for arguments that are not tensors.
SCHEMA = {
    op: f"{options}, ScalarType operand, {', '.join(f'bool want_{x}' for x in Wanted._fields)}"
    for op, options in SETTINGS_SCHEMA.items()
}
WANTED = len(Wanted._fields)


def split(arguments: tuple[Any, ...], op: str) -> tuple[Settings, torch.dtype, Wanted]:
    """Takes apart what :meth:`Problem.arguments` put together."""
    options = dict(zip(TAKEN[op], arguments, strict=False))
    return Settings(**options), arguments[-WANTED - 1], Wanted(*arguments[-WANTED:])


class Traits(NamedTuple):
    """The traits of a tensor on which the choice of a backend depends."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.layout = torch.strided
    strides: tuple[int, ...] | None = None  # of a matrix whose rows are not contiguous, or overlap


def traits_of(x: Tensor) -> Traits:
    """The traits of a tensor. A matrix has strides if its rows overlap or are not contiguous."""
    strides = None
    if x.layout == torch.strided and x.dim() == 2:
        (count, width), (rows, columns) = x.shape, x.stride()
        if (columns != 1 and width > 1) or (rows < width and count > 1):
            strides = (rows, columns)
    return Traits(x.device, x.dtype, x.layout, strides)


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type in which a gradient of ``dtype`` is kept until its upstream gradient is known.

    float16 has too little range below 1. A loss scale arrives only with the backward, which is
    too late for values that have already become 0.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache
def default_buffer_bytes(device: torch.device) -> int:
    """64 MiB on a CPU; on an accelerator 528 MiB, or 2 GiB if it has more than 40 GiB."""
    if device.type == "cpu":
        return CPU_BUFFER_BYTES
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if total > LARGE_MEMORY_BYTES:
            return LARGE_ACCELERATOR_BUFFER_BYTES
    return ACCELERATOR_BUFFER_BYTES


def make_problem(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [...]
    bias: Tensor | None,  # [V]
    seed: int | Tensor | None,
    settings: Settings,
    cu_seqlens: Tensor | None = None,  # [S + 1], for the shift
    adapter: tuple[Tensor, Tensor] | None = None,  # [..., r], [V, r]
) -> Problem:
    """Checks everything that can be checked without values, and flattens the tensors.

    Targets of int32 and uint8 become int64 here; with ``settings.shift`` they move by one.

    Raises:
        TypeError, ValueError, RuntimeError: the message names the argument.
    """
    check_derivatives(hidden=hidden, weight=weight, bias=bias)
    if isinstance(target, Tensor) and target.dtype in NARROW_TARGETS:
        target = target.long()
    if not _fit(hidden, weight, target, bias):
        check_core(hidden, weight, target, bias)
    # By identity: a value of another type may equal the default.
    if torch.compiler.is_compiling() or not all(map(is_, values_of(settings), _DEFAULTS)):
        check_settings(settings)
    if settings.check:
        check_waiting(hidden.device, settings.check)
    if seed is not None:
        _check_seed(seed, hidden)
    if settings.shift:
        target = shift_labels(target, cu_seqlens, settings.ignore_index)
    factor, operand = None, _operand(hidden, weight)
    if adapter is not None:
        hidden, factor = _with_adapter(hidden, weight, adapter, operand)
    wanted = Wanted(False, False, False)
    if torch.is_grad_enabled():
        of_bias = bias is not None and bias.requires_grad
        of_adapter = factor is not None and factor.requires_grad
        wanted = Wanted(hidden.requires_grad, weight.requires_grad, of_bias, of_adapter)
    samples = settings.gradient == "sampled" and any(wanted)
    return Problem(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        target=target.reshape(-1),
        bias=bias,
        seed=_seed_tensor(seed, hidden.device) if samples else None,
        settings=settings,
        operand=operand,
        wanted=wanted,
        adapter=factor,
    )


def _with_adapter(
    hidden: Tensor, weight: Tensor, adapter: object, operand: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``[hidden | a]`` and ``b`` of an adapter ``(a [..., r], b [V, r])``, which is checked.

    They are joined in the type of ``hidden``, or in that of operands if it is wider.
    """
    if not isinstance(adapter, tuple) or len(adapter) != 2:
        raise TypeError(
            f"adapter: got {type(adapter).__name__}, expected a pair of tensors (a, b), which adds "
            "a @ b.T to the products"
        )
    a, b = adapter
    check_derivatives(a=a, b=b)
    device = hidden.device
    for name, x, shape in (("a", a, hidden.shape[:-1]), ("b", b, weight.shape[:1])):
        check_tensor(f"adapter: {name}", x, (*shape, "r"), FLOAT_DTYPES, device)
        _check_width(f"adapter: {name}", x, hidden)
    if a.shape[-1] != b.shape[1] or b.shape[1] == 0:
        raise ValueError(
            f"adapter: got a {tuple(a.shape)} and b {tuple(b.shape)}, expected the same rank in "
            "their last dimension, at least 1"
        )
    dtype = operand if operand.itemsize > hidden.dtype.itemsize else hidden.dtype
    return torch.cat([hidden.to(dtype), a.to(dtype)], dim=-1), b


def _fit(hidden: object, weight: object, target: object, bias: object) -> bool:
    """Whether the tensors are as they should be; :func:`check_core` says what is wrong."""
    if not (
        isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(target, Tensor)
    ):
        return False
    floats = [hidden, weight]
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            return False
        floats.append(bias)
    is_float64, device = hidden.dtype == torch.float64, hidden.device
    for x in floats:
        if x.layout != torch.strided or x.device != device or x.dtype not in FLOAT_DTYPES:
            return False
        if (x.dtype == torch.float64) != is_float64:
            return False
    if hidden.dim() < 1 or weight.dim() != 2 or target.dtype != torch.int64:
        return False
    fits: bool = weight.shape[1] == hidden.shape[-1] and target.shape == hidden.shape[:-1]
    return fits and target.device == device and 0 < weight.shape[0] < 2**31 and weight.shape[1] > 0


def check_core(hidden: object, weight: object, target: object, bias: object) -> None:
    """Checks types, shapes, dtypes and devices of the core op's tensors."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden: got {type(hidden).__name__}, expected a torch.Tensor")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise TypeError(f"{name}: got layout {value.layout}, expected {torch.strided}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected (..., D)")
    check_tensor("hidden", hidden, hidden.shape, FLOAT_DTYPES)
    since = f"hidden has {hidden.shape[-1]} features"
    shape = ("V", hidden.shape[-1])
    check_tensor("weight", weight, shape, FLOAT_DTYPES, hidden.device, since=since)
    assert isinstance(weight, Tensor)
    vocabulary, width = weight.shape
    if vocabulary == 0 or width == 0:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (V, D) with V and D at least 1"
        )
    if vocabulary >= 2**31:
        raise ValueError(f"weight: got V = {vocabulary}, expected less than 2**31")
    integers = (torch.int64, *NARROW_TARGETS)
    since = f"hidden has shape {tuple(hidden.shape)}"
    check_tensor("target", target, hidden.shape[:-1], integers, hidden.device, since=since)
    if bias is not None:
        since = f"weight has {vocabulary} rows"
        check_tensor("bias", bias, (vocabulary,), FLOAT_DTYPES, hidden.device, since=since)
    for name, value in (("weight", weight), ("bias", bias)):
        if isinstance(value, Tensor):
            _check_width(name, value, hidden)


def _check_width(name: str, value: Tensor, hidden: Tensor) -> None:
    """Raises TypeError unless both are float64, or neither is."""
    if (value.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(
            f"{name}: got dtype {value.dtype} with hidden {hidden.dtype}, expected both "
            "float64 or neither: float64 is not mixed with narrower types"
        )


def check_derivatives(**tensors: object) -> None:
    """Refuses all but reverse mode: any other mode would lose a derivative silently.

    Raises:
        RuntimeError: the call is inside a transform of ``torch.func``, or one of ``tensors``
            carries a tangent of forward mode.
    """
    # Inside a transform a tensor's requires_grad cannot be trusted.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func: got a call inside a transform (vmap, grad, vjp, jvp, jacrev, jacfwd or "
            "hessian), expected one outside of any. The fused loss takes batches as leading "
            "dimensions of hidden and target, and its gradients are those of backward() and "
            "torch.autograd.grad. For anything else use torch.nn.functional.cross_entropy"
        )
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        # A tangent cannot be seen while tracing.
        if isinstance(tensor, Tensor) and (
            torch.compiler.is_compiling() or forward_ad.unpack_dual(tensor).tangent is not None
        ):
            raise RuntimeError(
                f"{name}: got a tensor with a tangent of forward-mode differentiation, or compiled "
                "code at a dual level, expected neither: the fused loss has gradients in reverse "
                "mode only. Use backward() or torch.autograd.grad, or "
                "torch.nn.functional.cross_entropy"
            )


def check_values(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises unless every target is a column or ``ignore_index``. Waits for the device."""
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(wrong.any()):
        position = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"target: got {int(target.flatten()[position])} at flattened position {position}, "
            f"expected 0 to V - 1 = {vocabulary - 1} or ignore_index = {ignore_index}"
        )


def _operand(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type to which the operands of GEMMs are rounded, as autocast would round them."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    available = device != "meta"  # torch 2.8 does not trace torch.amp.is_autocast_available
    if dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype


def _check_seed(seed: object, hidden: Tensor) -> None:
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), (torch.int64,), hidden.device)
    elif not isinstance(seed, torch.SymInt):
        check_int("seed", seed, -(2**63))


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)

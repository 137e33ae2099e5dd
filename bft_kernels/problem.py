"""One call of the loss: made and checked once, and handed on by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.common.plan import default_buffer_bytes
from bft_kernels.checks import check_core, check_derivatives, check_int, check_tensor, check_waiting
from bft_kernels.results import Wanted
from bft_kernels.settings import SCHEMA as SETTINGS_SCHEMA
from bft_kernels.settings import Settings, check_settings


@dataclass(frozen=True)
class Problem:
    """The tensors of a call, flattened, its settings, and what they ask for."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    bias: Tensor | None  # [V]
    seed: Tensor | None  # [] int64, of the sampled gradient
    settings: Settings
    # The type that operands of GEMMs are rounded to. Sums are in acc_dtype.
    operand: torch.dtype
    wanted: Wanted  # gradients: of the forward, or of this backward

    @property
    def shape(self) -> tuple[int, int, int]:
        """``N``, ``V``, ``D``."""
        return self.hidden.shape[0], *self.weight.shape

    @property
    def acc_dtype(self) -> torch.dtype:
        """The type of losses and sums: see :func:`accumulator`."""
        return accumulator(self.hidden.dtype)

    @property
    def trains_head(self) -> bool:
        """Whether a gradient of ``weight`` or ``bias`` is wanted."""
        return self.wanted.weight or self.wanted.bias

    @property
    def saved(self) -> str:
        """What the forward keeps for the backward.

        ``none``: nothing, no gradient is wanted. ``recompute``: lse to twice the precision, logits
        are computed again (exact, 4G). ``unit``: ``dH`` for unit upstream gradient (exact with a
        frozen head, 2G). ``entries``: the sparse sample of ``dy`` (sampled, 1G).
        """
        if not any(self.wanted):
            return "none"
        if self.settings.sampled:
            return "entries"
        return "recompute" if self.trains_head else "unit"

    @property
    def statistics(self) -> bool:
        """Whether entropy and correct are wanted."""
        return self.settings.return_stats

    @property
    def variance(self) -> bool:
        """Whether the certificate of the sampled gradient is wanted."""
        return self.settings.return_stats and self.settings.sampled

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
        """``[N]`` bool."""
        return self.target != self.settings.ignore_index

    def arguments(self) -> list[Any]:
        """What is no tensor, in the order of :data:`SCHEMA`."""
        return [*self.settings.arguments(), self.operand, *self.wanted]


# The part of the ops' schemas that carries what is no tensor.
SCHEMA = (
    f"{SETTINGS_SCHEMA}, ScalarType operand, bool want_hidden, bool want_weight, bool want_bias"
)


def split(arguments: tuple[Any, ...]) -> tuple[Settings, torch.dtype, Wanted]:
    """What :meth:`Problem.arguments` put together."""
    return Settings(*arguments[:-4]), arguments[-4], Wanted(*arguments[-3:])


class Traits(NamedTuple):
    """What the choice of a backend depends on of a tensor."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.layout = torch.strided
    strides: tuple[int, ...] | None = None  # of a matrix whose rows are not contiguous, or overlap


def traits_of(x: Tensor) -> Traits:
    """Of a tensor; of a matrix also how its rows lie."""
    strides = None
    if x.layout == torch.strided and x.dim() == 2:
        (count, width), (rows, columns) = x.shape, x.stride()
        if (columns != 1 and width > 1) or (rows < width and count > 1):
            strides = (rows, columns)
    return Traits(x.device, x.dtype, x.layout, strides)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 throughout; everything narrower is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type a gradient of ``dtype`` is kept in until its upstream gradient is known.

    float16 has too little range below 1: a loss scale can only arrive with the backward, too late
    for values that have already become 0.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def make_problem(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [...]
    bias: Tensor | None,  # [V]
    seed: int | Tensor | None,
    settings: Settings,
) -> Problem:
    """Checks everything that needs no values, and flattens.

    Raises:
        TypeError, ValueError, RuntimeError: the message names the argument.
    """
    check_derivatives(hidden=hidden, weight=weight, bias=bias)
    check_core(hidden, weight, target, bias)
    check_settings(settings)
    check_waiting(hidden.device, settings.check)
    if seed is not None:
        _check_seed(seed, hidden)
    wanted = Wanted(False, False, False)
    if torch.is_grad_enabled():
        of_bias = bias is not None and bias.requires_grad
        wanted = Wanted(hidden.requires_grad, weight.requires_grad, of_bias)
    samples = settings.sampled and any(wanted)
    return Problem(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        target=target.reshape(-1),
        bias=bias,
        seed=_seed_tensor(seed, hidden.device) if samples else None,
        settings=settings,
        operand=_operand(hidden, weight),
        wanted=wanted,
    )


def _operand(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type the operands of products are rounded to, as autocast would."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    available = device != "meta"  # torch 2.8 does not trace torch.amp.is_autocast_available
    if dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype


def _check_seed(seed: object, hidden: Tensor) -> None:
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), (torch.int64,), hidden.device)
    else:
        check_int("seed", seed, -(2**63))


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)

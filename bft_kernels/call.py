"""A call of a public function: its arguments checked, flattened, and handed to the ops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bft_kernels import autograd as _autograd  # noqa: F401  registers the gradients
from bft_kernels import ops
from bft_kernels.checks import (
    FLOAT_DTYPES,
    check_boundaries,
    check_core,
    check_derivatives,
    check_finite,
    check_int,
    check_number,
    check_settings,
    check_tensor,
    check_unchecked,
)
from bft_kernels.config import CoreConfig, Weighting, accumulator
from bft_kernels.plan import default_buffer_bytes
from bft_kernels.results import BalancedLoss, Forward, Wanted, WeightedLoss
from bft_kernels.weighting import SchemeFunction, balanced_loss, boundaries_beside


@dataclass(frozen=True)
class Call:
    """A checked call: flattened tensors and settings."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None
    seed: int | Tensor | None
    gradient: str
    config: CoreConfig
    shape: torch.Size  # of the caller's target
    statistics: bool
    check: bool | None

    @property
    def trains_head(self) -> bool:
        bias = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (self.weight.requires_grad or bias)

    @property
    def wanted(self) -> Wanted:
        bias = self.bias is not None and self.bias.requires_grad
        return Wanted(self.hidden.requires_grad, self.weight.requires_grad, bias)

    @property
    def labelled(self) -> Tensor:
        return self.target != self.config.ignore_index

    @property
    def wide(self) -> torch.dtype:
        return accumulator(self.hidden.dtype)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    gradient: str,
    eps: float,
    seed: int | Tensor | None,
    backend: str,
    max_buffer_bytes: int | None,
    check: bool | None,
    return_stats: bool,
    hidden_variance: bool,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Call:
    """Checks everything that needs no values, and flattens."""
    check_derivatives(hidden=hidden, weight=weight, bias=bias)
    check_core(hidden, weight, target, bias)
    check_settings(
        {
            "ignore_index": ignore_index,
            "softcap": softcap,
            "temperature": temperature,
            "gradient": gradient,
            "eps": eps,
            "backend": backend,
            "max_buffer_bytes": max_buffer_bytes,
            "check": check,
            "return_stats": return_stats,
            "hidden_variance": hidden_variance,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
        }
    )
    check_unchecked(hidden.device, check)
    seed = _check_seed(seed, hidden)
    device = hidden.device.type
    config = CoreConfig(
        ignore_index=ignore_index,
        softcap=None if softcap is None else float(softcap),
        temperature=float(temperature),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        eps=float(eps),
        residual="none",
        statistics=return_stats,
        variance=return_stats and gradient == "sampled",
        hidden_variance=return_stats and hidden_variance,
        operand=_operand(hidden, weight),
        backend=backend,
        max_buffer_bytes=max_buffer_bytes or default_buffer_bytes(device),
        check_values=device == "cpu" if check is None else check,
        check_finite=bool(check),
    )
    return Call(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        seed,
        gradient,
        config,
        target.shape,
        return_stats,
        check,
    )


def _operand(hidden: Tensor, weight: Tensor) -> str:
    """Name of the type the products' operands are rounded to, as autocast would."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    available = device != "meta"  # torch 2.8 does not trace torch.amp.is_autocast_available
    if dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return str(dtype).removeprefix("torch.")


def _check_seed(seed: object, hidden: Tensor) -> int | Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), (torch.int64,), hidden.device)
        return seed
    check_int("seed", seed, -(2**63))
    assert isinstance(seed, int)
    return seed


def _residual(call: Call) -> str:
    """What the forward has to keep, from what requires a gradient."""
    if not torch.is_grad_enabled() or not any(call.wanted):
        return "none"
    if call.gradient == "sampled":
        return "entries"
    return "recompute" if call.trains_head else "unit"


def run(call: Call) -> Forward:
    """The loss of each token, with what its backward needs, if any."""
    config = replace(call.config, residual=_residual(call))
    seed = None
    if config.residual == "entries":
        seed = _seed_tensor(call.seed, call.hidden.device)
    return Forward(
        *ops.linear_nll(call.hidden, call.weight, call.target, call.bias, seed, *config.arguments())
    )


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def run_weighted(
    call: Call,
    share: Tensor,
    documents: Tensor | None,
    bounds: Tensor | None,
    weighting: Weighting,
) -> WeightedLoss:
    """The weighted sum, its gradients made along with it. For weights local to a token there need
    be no ``documents``; ``bounds`` are those on the CPU, unless documents are rows.
    """
    settings = (weighting.scheme, weighting.window, weighting.gamma, weighting.floor)
    config = replace(call.config, residual="recompute")
    return WeightedLoss(
        *ops.weighted_loss(
            call.hidden,
            call.weight,
            call.target,
            share,
            documents,
            bounds,
            call.bias,
            *config.arguments(),
            *settings,
            *call.wanted,
        )
    )


def boundaries_of(cu_seqlens: Tensor | None, call: Call) -> Tensor | None:
    """``[S + 1]`` int64, where it was given; ``None`` where documents are rows."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, call.hidden.device)
        # Looking at boundaries on the CPU waits for nothing.
        free = cu_seqlens.device.type == "cpu" and call.check is not False
        if free or call.check:
            return ops.documents(cu_seqlens, call.target.numel())
        return cu_seqlens.long()
    if len(call.shape) > 2:
        raise ValueError(
            f"cu_seqlens: got None with a target of shape {tuple(call.shape)}, expected "
            "boundaries: only the rows of a 2-D target are documents by themselves"
        )
    return None


def documents_of(boundaries: Tensor | None, call: Call) -> Tensor:
    """``[S + 1]`` int64 beside the tokens; made there, unless the caller's lie elsewhere."""
    device = call.hidden.device
    if boundaries is not None:
        return boundaries_beside(boundaries, device)
    rows = call.shape[0] if len(call.shape) == 2 else 1
    length = call.shape[-1] if call.shape else 1
    return torch.arange(rows + 1, dtype=torch.int64, device=device) * length


def balance(
    loss: Tensor,  # [N], without smoothing and z-loss: the nll
    inputs: tuple[Tensor, Tensor, Tensor | None, str],
    settings: tuple[str | SchemeFunction, int, float, float],
    backend: str,
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`; an op, unless a callable must be seen."""
    if isinstance(settings[0], str):
        return BalancedLoss(*ops.balanced_loss(loss, *inputs, *settings, backend))
    return balanced_loss(loss, *inputs, *settings)


def items_of(num_items: int | float | Tensor | None, call: Call) -> Tensor | None:
    """``num_items`` as a tensor ``[]`` beside the tokens."""
    device = call.hidden.device
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items: got shape {tuple(num_items.shape)}, expected a number or a tensor []"
            )
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items: got dtype {num_items.dtype}, expected a count")
        items = num_items.detach().reshape(())
    else:
        check_number("num_items", num_items, 0)
        items = torch.full((), float(num_items), dtype=call.wide, device=device)
    if call.check or items.device.type == "cpu":
        return ops.num_items(items, call.labelled, bool(call.check))
    return items.to(device)


def check_token_weight(token_weight: object, call: Call) -> None:
    """A constant beside each token.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: another shape or device, one that requires a gradient, or not finite.
        RuntimeError: one with a tangent.
    """
    check_tensor("token_weight", token_weight, call.shape, FLOAT_DTYPES, call.hidden.device)
    assert isinstance(token_weight, Tensor)
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight: got a tensor that requires a gradient, expected a constant: detach it, "
            "or use reduction='none' and multiply"
        )
    check_derivatives(token_weight=token_weight)
    if call.check and not torch.compiler.is_compiling():
        check_finite("token_weight", token_weight.reshape(-1, 1), rows=call.labelled)

"""Schemas and fakes of the custom ops; the implementations are the backends' (see ``dispatch``).

Three forward ops rest on the backends:

``bft_kernels::linear_nll``
    per-token losses and statistics, and what its backward needs (``residual``);
``bft_kernels::weighted_loss``
    a weighted sum of token losses whose weights are known, or become known, inside a block of
    logits: it makes the gradients in the same pass, for 3G instead of 4G;
``bft_kernels::balanced_loss``
    a weighted sum of token losses that are there, with the weights made from them.

Backends are chosen inside the implementations, where the tensors are real, so that tracing sees one
opaque op whatever will run it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bft_kernels.checks import (
    check_bias,
    check_boundary_values,
    check_capture,
    check_finite,
    check_items,
    check_unchecked,
    check_values,
)
from bft_kernels.config import CONFIG_SCHEMA, CoreConfig, Weighting, accumulator, storage
from bft_kernels.dispatch import select, select_balanced_loss
from bft_kernels.precision import own_settings
from bft_kernels.results import (
    BalancedLoss,
    Documents,
    Forward,
    Gradients,
    Saved,
    Wanted,
    WeightedLoss,
)
from bft_kernels.weighting import boundaries_beside

_INPUTS = "Tensor hidden, Tensor weight, Tensor target"
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"
_SAVED = (
    "Tensor nll, Tensor lse, Tensor lse_low, Tensor entry_offsets, Tensor entry_columns, "
    "Tensor entry_values, Tensor? seed"
)
_WEIGHTING = "str scheme, int window, float gamma, float floor"

# Arguments of linear_nll before its settings, and of weighted_loss before its settings.
LINEAR_NLL_TENSORS = 5
WEIGHTED_LOSS_TENSORS = 7


def _returns(record: type) -> str:
    return ", ".join(f"Tensor {name}" for name in record._fields)  # type: ignore[attr-defined]


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, config: CoreConfig
) -> None:
    check_unchecked(hidden.device, config.check_values or config.check_finite)
    if config.check_values:
        check_values(target, weight.shape[0], config.ignore_index)
    if config.check_finite:
        check_finite("hidden", hidden, rows=target != config.ignore_index)
        check_finite("weight", weight)
        if bias is not None:
            check_bias(bias)


@torch.library.custom_op("bft_kernels::documents", mutates_args=())
def documents(cu_seqlens: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` as int64, its values checked: an op, so that compiled code checks them too."""
    check_unchecked(cu_seqlens.device, True)
    check_boundary_values(cu_seqlens, total)
    return cu_seqlens.to(torch.int64, copy=True)


@documents.register_fake
def _(cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


@torch.library.custom_op("bft_kernels::num_items", mutates_args=())
def num_items(items: Tensor, labelled: Tensor, wait: bool) -> Tensor:
    """``items []`` beside ``labelled [N]``, its value checked: an op, as :func:`documents` is."""
    device = labelled.device
    check_unchecked(device, wait)
    if items.device != device:
        check_capture(
            device,
            f"num_items: got a tensor on {items.device}",
            f"a number, or a tensor on {device} that a replay may find changed",
        )
    check_items(items, labelled, wait)
    if items.device.type == "cpu":  # a value takes no copy
        return torch.full((), items.item(), dtype=items.dtype, device=device)
    return items.to(device, copy=True, non_blocking=True)


@num_items.register_fake
def _(items: Tensor, labelled: Tensor, wait: bool) -> Tensor:
    return torch.empty_like(items, device=labelled.device)


@torch.library.custom_op(
    "bft_kernels::linear_nll",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? bias, Tensor? seed, {CONFIG_SCHEMA}) -> ({_returns(Forward)})",
)
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """See :class:`bft_kernels.results.Forward`. ``settings``: the fields of ``CoreConfig``."""
    config = CoreConfig(*settings)
    _check(hidden, weight, target, bias, config)
    backend = select(config.backend, hidden, weight, config.operand_dtype)
    with own_settings(hidden):
        return tuple(backend.linear_nll(hidden, weight, target, bias, seed, config))


@linear_nll.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    config = CoreConfig(*settings)
    count, width = hidden.shape
    wide = accumulator(hidden.dtype)

    def tokens(wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(count if wanted else 0, dtype=dtype)

    sampled = config.residual == "entries"
    entries = torch.library.get_ctx().new_dynamic_size() if sampled else 0
    values = torch.library.get_ctx().new_dynamic_size() if sampled else 0
    unit = count if config.residual == "unit" else 0
    return Forward(
        loss=tokens(True),
        nll=tokens(True),
        lse=tokens(True),
        lse_low=tokens(config.residual == "recompute"),
        entropy=tokens(config.statistics),
        correct=tokens(config.statistics, torch.bool),
        variance=tokens(config.variance),
        hidden_variance=tokens(config.hidden_variance),
        unit=hidden.new_empty(unit, width, dtype=storage(hidden.dtype)),
        entry_offsets=hidden.new_empty(count + 1 if sampled else 0, dtype=torch.int64),
        entry_columns=hidden.new_empty(entries, dtype=torch.int32),
        entry_values=hidden.new_empty(values, dtype=wide),
    )


@torch.library.custom_op(
    "bft_kernels::linear_nll_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_INPUTS}, Tensor? bias, {_SAVED}, {CONFIG_SCHEMA}, {_WANTED})"
        f" -> ({_returns(Gradients)})"
    ),
)
def linear_nll_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """``rest``: the fields of ``Saved``, of ``CoreConfig`` and of ``Wanted``."""
    saved, config, wanted = _split_backward(rest)
    gradients = run_backward(grad, hidden, weight, target, bias, saved, config, wanted)
    absent = hidden.new_empty(0)
    return tuple(absent.clone() if part is None else part for part in gradients)


def run_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    saved: Saved,
    config: CoreConfig,
    wanted: Wanted,
    grad_weight: Tensor | None = None,
) -> Gradients:
    """The backward on real tensors; adds to ``grad_weight`` in place if it is given."""
    backend = select(config.backend, hidden, weight, config.operand_dtype)
    with own_settings(hidden):
        return backend.linear_nll_backward(
            grad, hidden, weight, target, bias, saved, config, wanted, grad_weight
        )


def _split_backward(rest: tuple[Any, ...]) -> tuple[Saved, CoreConfig, Wanted]:
    saved, wanted = len(Saved._fields), len(Wanted._fields)
    return (
        Saved(*rest[:saved]),
        CoreConfig(*rest[saved:-wanted]),
        Wanted(*rest[-wanted:]),
    )


@linear_nll_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _, _, wanted = _split_backward(rest)
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight.new_empty(weight.shape) if wanted.weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=accumulator(hidden.dtype))
        if wanted.bias
        else hidden.new_empty(0),
    )


@torch.library.custom_op(
    "bft_kernels::weighted_loss",
    mutates_args=(),
    schema=(
        f"({_INPUTS}, Tensor share, Tensor? cu_seqlens, Tensor? bounds, Tensor? bias, "
        f"{CONFIG_SCHEMA}, "
        f"{_WEIGHTING}, {_WANTED}) -> ({_returns(WeightedLoss)})"
    ),
)
def weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    share: Tensor,
    cu_seqlens: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """``rest``: the fields of ``CoreConfig``, of ``Weighting`` and of ``Wanted``.

    ``cu_seqlens`` lies beside the tokens, and is not looked at for weights local to a token.
    ``bounds`` are the same on the CPU; ``None`` beside tokens on an accelerator says that documents
    are equally long.
    """
    config, weighting, wanted = split_weighted(rest)
    documents = None
    if cu_seqlens is not None and not weighting.local:
        documents = _documents_on_host(cu_seqlens, bounds, hidden)
    _check(hidden, weight, target, bias, config)
    backend = select(config.backend, hidden, weight, config.operand_dtype)
    with own_settings(hidden):
        return tuple(
            backend.weighted_loss(
                hidden, weight, target, share, documents, bias, config, weighting, wanted
            )
        )


def _documents_on_host(cu_seqlens: Tensor, bounds: Tensor | None, hidden: Tensor) -> Documents:
    if bounds is not None:
        check_capture(
            hidden.device,
            "cu_seqlens: got a tensor on the CPU",
            f"one on {hidden.device}: a replay would keep to the boundaries of the capture. Move "
            "it there before; rows of equal length need none",
        )
        return Documents(cu_seqlens, bounds.tolist())
    if cu_seqlens.device.type == "cpu":
        return Documents(cu_seqlens, cu_seqlens.tolist())
    documents = cu_seqlens.numel() - 1
    length = hidden.shape[0] // max(1, documents)
    return Documents(cu_seqlens, [place * length for place in range(documents + 1)])


def split_weighted(rest: tuple[Any, ...]) -> tuple[CoreConfig, Weighting, Wanted]:
    """The settings of ``weighted_loss`` from its trailing arguments."""
    wanted = len(Wanted._fields)
    weighting = wanted + 4
    return (
        CoreConfig(*rest[:-weighting]),
        Weighting(*rest[-weighting:-wanted]),
        Wanted(*rest[-wanted:]),
    )


@weighted_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    share: Tensor,
    cu_seqlens: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    config, _, wanted = split_weighted(rest)
    count, width = hidden.shape
    vocabulary = weight.shape[0]
    wide = accumulator(hidden.dtype)
    statistics = count if config.statistics else 0
    return WeightedLoss(
        loss=hidden.new_empty((), dtype=wide),
        grad_hidden=hidden.new_empty(
            count if wanted.hidden else 0, width, dtype=storage(hidden.dtype)
        ),
        grad_weight=weight.new_empty(
            vocabulary if wanted.weight else 0, width, dtype=storage(weight.dtype)
        ),
        grad_bias=hidden.new_empty(vocabulary if wanted.bias else 0, dtype=wide),
        nll=hidden.new_empty(count, dtype=wide),
        lse=hidden.new_empty(count, dtype=wide),
        entropy=hidden.new_empty(statistics, dtype=wide),
        correct=hidden.new_empty(statistics, dtype=torch.bool),
    )


@torch.library.custom_op(
    "bft_kernels::balanced_loss",
    mutates_args=(),
    schema=(
        "(Tensor loss, Tensor labelled, Tensor cu_seqlens, Tensor? num_items, str normalize, "
        f"{_WEIGHTING}, str backend) -> ({_returns(BalancedLoss)})"
    ),
)
def balanced_loss(
    loss: Tensor,
    labelled: Tensor,
    cu_seqlens: Tensor,
    num_items: Tensor | None,
    normalize: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """See :func:`bft_kernels.weighting.balanced_loss`. ``rest``: the fields of ``Weighting``, and
    the backend's name.
    """
    *weighting, backend = rest
    function = select_balanced_loss(backend, loss)
    cu_seqlens = boundaries_beside(cu_seqlens, loss.device)
    with torch.cuda.device_of(loss):
        return tuple(
            function(loss, labelled, cu_seqlens, num_items, normalize, Weighting(*weighting))
        )


@balanced_loss.register_fake
def _(
    loss: Tensor,
    labelled: Tensor,
    cu_seqlens: Tensor,
    num_items: Tensor | None,
    normalize: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def tokens() -> Tensor:
        return loss.new_empty(loss.shape[0])

    def sequences() -> Tensor:
        return loss.new_empty(cu_seqlens.shape[0] - 1)

    return BalancedLoss(
        loss=loss.new_empty(()),
        coefficient=tokens(),
        token_weight=tokens(),
        window_confidence=tokens(),
        sequence_weight=sequences(),
        sequence_confidence=sequences(),
    )

"""Schemas and fakes of the custom ops. The backends implement them (see ``dispatch``).

Three forward ops call the backends:

``bft_kernels::linear_nll``
    gives per-token losses and statistics, and what its backward needs;
``bft_kernels::weighted_loss``
    gives a weighted sum of token losses. Since the weights are known, or become known inside a
    block of logits, it makes the gradients in the same pass, for 3G instead of 4G;
``bft_kernels::balanced_loss``
    gives a weighted sum of token losses that exist already, and makes the weights from them.

A backend is chosen inside the implementation, where the tensors are real. So tracing sees one
opaque op, whichever backend will run it. ``Problem.arguments`` puts together all arguments that are
not tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bft_kernels import problem as problems
from bft_kernels import weighting
from bft_kernels.checks import (
    check_bias,
    check_boundary_values,
    check_capture,
    check_finite,
    check_items,
    check_waiting,
)
from bft_kernels.dispatch import Engine, captures, engine, offered, select
from bft_kernels.documents import boundaries_beside
from bft_kernels.precision import own_settings
from bft_kernels.problem import Problem, check_values, storage, traits_of
from bft_kernels.results import (
    BalancedLoss,
    Documents,
    Forward,
    Gradients,
    Saved,
    Wanted,
    WeightedLoss,
)
from bft_kernels.settings import BALANCED, NLL, TAKEN, WEIGHTED, Settings
from bft_kernels.settings import SCHEMA as SETTINGS_SCHEMA

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? seed, Tensor? adapter"
)
TENSORS = 6  # how many these are


_TOP = len(Forward._fields) - 2  # where the results of top_k begin


def _fields(record: type, stop: int | None = None) -> str:
    names = record._fields[:stop]  # type: ignore[attr-defined]
    return ", ".join([f"Tensor {name}" for name in names])


def as_problem(tensors: tuple[Any, ...], rest: tuple[Any, ...], op: str = NLL) -> Problem:
    """A problem from an op's arguments: ``_TENSORS``, then those of ``Problem.arguments``."""
    hidden, weight, target, bias, seed, adapter = tensors
    options = problems.split(rest, op)
    return Problem(hidden, weight, target, bias, seed, *options, adapter)


def _engine(problem: Problem) -> Engine:
    hidden, weight = traits_of(problem.hidden), traits_of(problem.weight)
    # The device's type is tested here too, so that a call on a CPU does not call `captures`.
    now = hidden.device.type == "cuda" and captures(hidden.device)
    choose = select.__wrapped__ if now else select
    backend = choose(problem.settings.backend, hidden, weight, problem.operand)
    return backend if problem.adapter is None else _for_adapter(problem, backend)


def _for_adapter(problem: Problem, backend: Engine) -> Engine:
    """Plain PyTorch where a backend has no whole rows of logits, or may compute some again."""
    return engine("torch") if problem.saved == "entries" else _of_whole_rows(backend)


def _of_whole_rows(backend: Engine) -> Engine:
    """The backend, or plain PyTorch where its blocks hold no whole rows of logits."""
    return backend if getattr(backend, "HOLDS_ROWS", True) else engine("torch")


def tensors_of(problem: Problem) -> tuple[Tensor | None, ...]:
    """The arguments of ``_TENSORS``."""
    p = problem
    return p.hidden, p.weight, p.target, p.bias, p.seed, p.adapter


def _check(problem: Problem) -> None:
    check = problem.settings.check
    if check:
        check_waiting(problem.hidden.device, check)
    if check or (check is None and problem.hidden.device.type == "cpu"):
        check_values(problem.target, problem.weight.shape[0], problem.settings.ignore_index)
    if check:
        check_finite("hidden", problem.hidden, rows=problem.labelled)
        check_finite("weight", problem.weight)
        if problem.bias is not None:
            check_bias(problem.bias)
        if problem.adapter is not None:
            check_finite("adapter: b", problem.adapter)


@torch.library.custom_op("bft_kernels::documents", mutates_args=())
def documents(cu_seqlens: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` as int64, with checked values: an op, so that compiled code checks too."""
    check_waiting(cu_seqlens.device, True)
    check_boundary_values(cu_seqlens, total)
    return cu_seqlens.to(torch.int64, copy=True)


@documents.register_fake
def _(cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


@torch.library.custom_op("bft_kernels::num_items", mutates_args=())
def num_items(items: Tensor, labelled: Tensor, wait: bool) -> Tensor:
    """``items []``, checked, on the device of ``labelled [N]``; an op like :func:`documents`."""
    device = labelled.device
    check_waiting(device, wait)
    if items.device != device:
        check_capture(
            device,
            f"num_items: got a tensor on {items.device}",
            f"a number, or a tensor on {device} that a replay may find changed",
        )
    check_items(items, labelled, wait)
    if items.device.type == "cpu":  # a number needs no copy
        return torch.full((), items.item(), dtype=items.dtype, device=device)
    return items.to(device, copy=True, non_blocking=True)


@num_items.register_fake
def _(items: Tensor, labelled: Tensor, wait: bool) -> Tensor:
    return torch.empty_like(items, device=labelled.device)


# --- token losses --------------------------------------------------------------------------------


@torch.library.custom_op(
    "bft_kernels::linear_nll",
    mutates_args=(),
    schema=f"({_TENSORS}, {problems.SCHEMA[NLL]}) -> ({_fields(Forward, _TOP)})",
)
def linear_nll_op(*arguments: Any) -> tuple[Any, ...]:
    """See :class:`bft_kernels.results.Forward`."""
    problem = as_problem(arguments[:TENSORS], arguments[TENSORS:])
    _check(problem)
    backend = _engine(problem)
    with own_settings(problem.hidden):
        return backend.linear_nll(problem)[:_TOP]


@torch.library.custom_op(
    "bft_kernels::linear_nll_top_k",
    mutates_args=(),
    schema=f"({_TENSORS}, {problems.SCHEMA[NLL]}) -> ({_fields(Forward)})",
)
def linear_nll_top_k_op(*arguments: Any) -> tuple[Any, ...]:
    """The same with the most probable tokens; plain PyTorch where a backend holds no whole rows."""
    problem = as_problem(arguments[:TENSORS], arguments[TENSORS:])
    _check(problem)
    backend = _of_whole_rows(_engine(problem))
    with own_settings(problem.hidden):
        return tuple(backend.linear_nll(problem))


def linear_nll(problem: Problem) -> Forward:
    """The loss of each token, and what its backward needs, if there is one."""
    p, op = problem, linear_nll_top_k_op if problem.settings.top_k else linear_nll_op
    return Forward(*op(*tensors_of(p), *p.arguments(NLL)))


@linear_nll_op.register_fake
def _(*arguments: Any) -> tuple[Any, ...]:
    return _fake_forward(arguments)[:_TOP]


@linear_nll_top_k_op.register_fake
def _(*arguments: Any) -> tuple[Any, ...]:
    return tuple(_fake_forward(arguments))


def _fake_forward(arguments: tuple[Any, ...]) -> Forward:
    problem = as_problem(arguments[:TENSORS], arguments[TENSORS:])
    hidden, acc_dtype, saved = problem.hidden, problem.acc_dtype, problem.saved
    count, width = hidden.shape

    def tokens(wanted: bool, dtype: torch.dtype = acc_dtype) -> Tensor:
        return hidden.new_empty(count if wanted else 0, dtype=dtype)

    sampled = saved == "entries"
    entries = torch.library.get_ctx().new_dynamic_size() if sampled else 0
    values = torch.library.get_ctx().new_dynamic_size() if sampled else 0
    return Forward(
        loss=tokens(True),
        nll=tokens(True),
        lse=tokens(True),
        lse_low=tokens(saved == "recompute"),
        entropy=tokens(problem.statistics),
        correct=tokens(problem.statistics, torch.bool),
        variance=tokens(problem.variance),
        hidden_variance=tokens(problem.hidden_variance),
        unit=hidden.new_empty(count if saved == "unit" else 0, width, dtype=storage(hidden.dtype)),
        csr_offsets=hidden.new_empty(count + 1 if sampled else 0, dtype=torch.int64),
        csr_columns=hidden.new_empty(entries, dtype=torch.int32),
        csr_values=hidden.new_empty(values, dtype=acc_dtype),
        top_ids=hidden.new_empty(count, problem.settings.top_k, dtype=torch.int64),
        top_log_probs=hidden.new_empty(count, problem.settings.top_k, dtype=acc_dtype),
    )


@torch.library.custom_op(
    "bft_kernels::linear_nll_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_fields(Saved)}, {_TENSORS}, {problems.SCHEMA[NLL]}) "
        f"-> ({_fields(Gradients)})"
    ),
)
def linear_nll_backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """See :class:`bft_kernels.results.Gradients`; empty tensors stand for ``None``."""
    grad, saved, problem = _split_backward(arguments)
    absent = problem.hidden.new_empty(0)
    return tuple(
        [absent.clone() if x is None else x for x in linear_nll_backward(problem, grad, saved)]
    )


def linear_nll_backward(
    problem: Problem, grad: Tensor, saved: Saved, grad_weight: Tensor | None = None
) -> Gradients:
    """The backward on real tensors; adds to ``grad_weight`` in place if it is given.

    ``grad`` is ``[N]``. For an exact gradient with differentiable statistics it is ``[3, N]``, the
    factors of ``nll``'s gradient, of ``p_v`` and of ``p_v (z_v - lse)``: plain PyTorch computes
    that in blocks for every backend.
    """
    exact = problem.settings.gradient == "exact"
    if problem.adapter is not None and not exact:
        return _sampled_with_adapter(problem, problem.adapter, grad, saved, grad_weight)
    by_torch = grad.dim() > 1 or problem.adapter is not None
    backend = engine("torch") if by_torch else _engine(problem)
    with own_settings(problem.hidden):
        return backend.linear_nll_backward(problem, grad, saved, grad_weight)


def _sampled_with_adapter(
    problem: Problem, b: Tensor, grad: Tensor, saved: Saved, grad_weight: Tensor | None
) -> Gradients:
    """The gradients of the sample by ``weight`` and by the adapter, which share its entries."""
    width, wanted = problem.weight.shape[1], problem.wanted
    hidden, a = problem.hidden[:, :width], problem.hidden[:, width:]
    of_weight = wanted._replace(adapter=False)
    of_adapter = Wanted(hidden=wanted.hidden, weight=wanted.adapter, bias=False)
    main = replace(problem, hidden=hidden, adapter=None, wanted=of_weight)
    low = replace(problem, hidden=a, weight=b, bias=None, adapter=None, wanted=of_adapter)
    made = linear_nll_backward(main, grad, saved, grad_weight)
    with own_settings(problem.hidden):
        more = engine("torch").linear_nll_backward(low, grad, saved, None)
    if made.hidden is not None and more.hidden is not None:
        made = made._replace(hidden=torch.cat([made.hidden, more.hidden], dim=1))
    return made._replace(adapter=more.weight)


def _split_backward(arguments: tuple[Any, ...]) -> tuple[Tensor, Saved, Problem]:
    grad, rest = arguments[0], arguments[1:]
    saved, rest = Saved(*rest[: len(Saved._fields)]), rest[len(Saved._fields) :]
    return grad, saved, as_problem(rest[:TENSORS], rest[TENSORS:])


@linear_nll_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(_split_backward(arguments)[2])


def _fake_gradients(problem: Problem) -> tuple[Tensor, ...]:
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    absent = hidden.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if wanted.hidden else absent,
        weight.new_empty(weight.shape) if wanted.weight else absent.clone(),
        hidden.new_empty(weight.shape[0], dtype=problem.acc_dtype)
        if wanted.bias
        else absent.clone(),
        problem.adapter.new_empty(problem.adapter.shape)
        if problem.adapter is not None and wanted.adapter
        else absent.clone(),
    )


@torch.library.custom_op(
    "bft_kernels::spread_loss",
    mutates_args=(),
    schema=f"(Tensor class_weight, Tensor lse, {_TENSORS}, {problems.SCHEMA[NLL]}) -> Tensor",
)
def spread_loss_op(class_weight: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    """See :func:`spread_loss`."""
    problem = as_problem(rest[:TENSORS], rest[TENSORS:])
    with own_settings(problem.hidden):
        loss: Tensor = engine("torch").spread_loss(problem, class_weight, lse)
    return loss


def spread_loss(
    problem: Problem,
    class_weight: Tensor,  # [V] acc, a constant
    lse: Tensor,  # [N] acc
) -> Tensor:  # [N] acc, 0 where ignored
    """``sum_v w_v (lse - z_v)``, the loss of a label that is spread over the classes.

    It is for logits with a softcap, and computed by plain PyTorch in blocks for every backend.
    """
    given = *tensors_of(problem), *problem.arguments(NLL)
    loss: Tensor = spread_loss_op(class_weight, lse, *given)
    return loss


@spread_loss_op.register_fake
def _(class_weight: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(lse)


@torch.library.custom_op(
    "bft_kernels::spread_loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, Tensor class_weight, {_TENSORS}, {problems.SCHEMA[NLL]}) "
        f"-> ({_fields(Gradients)})"
    ),
)
def spread_loss_backward_op(grad: Tensor, class_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """See :class:`bft_kernels.results.Gradients`; empty tensors stand for ``None``."""
    problem = as_problem(rest[:TENSORS], rest[TENSORS:])
    with own_settings(problem.hidden):
        gradients = engine("torch").spread_loss_backward(problem, grad, class_weight)
    absent = problem.hidden.new_empty(0)
    return tuple([absent.clone() if x is None else x for x in gradients])


@spread_loss_backward_op.register_fake
def _(grad: Tensor, class_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(as_problem(rest[:TENSORS], rest[TENSORS:]))


# --- weighted sums of token losses ---------------------------------------------------------------


@torch.library.custom_op(
    "bft_kernels::weighted_loss",
    mutates_args=(),
    schema=(
        f"(Tensor token_scale, Tensor? cu_seqlens, Tensor? bounds, {_TENSORS}, "
        f"{problems.SCHEMA[WEIGHTED]})"
        f" -> ({_fields(WeightedLoss)})"
    ),
)
def weighted_loss_op(
    token_scale: Tensor, cu_seqlens: Tensor | None, bounds: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """See :func:`weighted_loss`."""
    problem = as_problem(rest[:TENSORS], rest[TENSORS:], WEIGHTED)
    documents = None
    if cu_seqlens is not None:
        documents = _documents_on_host(cu_seqlens, bounds, problem.hidden)
    _check(problem)
    backend = _engine(problem)
    with own_settings(problem.hidden):
        made = backend.weighted_loss(problem, token_scale, documents)
    if made.grad_adapter is None:
        made = made._replace(grad_adapter=token_scale.new_empty(0))
    return tuple(made)


def weighted_loss(
    problem: Problem,
    token_scale: Tensor,  # [N], the factor of each token's weight
    cu_seqlens: Tensor | None = None,  # [S + 1] int64; None for weights local to a token
    bounds: Tensor | None = None,  # [S + 1] int64 on the CPU
) -> WeightedLoss:
    """The weighted sum, and the gradients that are made along with it.

    ``cu_seqlens`` lies on the tokens' device, and ``bounds`` are the same boundaries. If the tokens
    are on an accelerator and ``bounds`` is ``None``, all documents are equally long.
    """
    p = problem
    tensors = p.hidden, p.weight, p.target, p.bias, None, p.adapter
    return WeightedLoss(
        *weighted_loss_op(token_scale, cu_seqlens, bounds, *tensors, *p.arguments(WEIGHTED))
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


@weighted_loss_op.register_fake
def _(
    token_scale: Tensor, cu_seqlens: Tensor | None, bounds: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    problem = as_problem(rest[:TENSORS], rest[TENSORS:], WEIGHTED)
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    acc_dtype, (count, vocabulary, width) = problem.acc_dtype, problem.shape
    statistics = count if problem.statistics else 0
    weighs = problem.statistics and cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if weighs and cu_seqlens is not None else 0

    def vector(size: int, dtype: torch.dtype = acc_dtype) -> Tensor:
        return hidden.new_empty(size, dtype=dtype)

    return WeightedLoss(
        loss=hidden.new_empty((), dtype=acc_dtype),
        grad_hidden=hidden.new_empty(
            count if wanted.hidden else 0, width, dtype=storage(hidden.dtype)
        ),
        grad_weight=weight.new_empty(
            vocabulary if wanted.weight else 0, weight.shape[1], dtype=storage(weight.dtype)
        ),
        grad_bias=vector(vocabulary if wanted.bias else 0),
        nll=vector(count),
        lse=vector(count),
        entropy=vector(statistics),
        correct=vector(statistics, torch.bool),
        token_weight=vector(count if weighs else 0),
        window_confidence=vector(count if weighs else 0),
        sequence_weight=vector(sequences),
        sequence_confidence=vector(sequences),
        grad_adapter=token_scale.new_empty(0)
        if problem.adapter is None
        else problem.adapter.new_empty(
            vocabulary if wanted.adapter else 0,
            problem.adapter.shape[1],
            dtype=storage(problem.adapter.dtype),
        ),
    )


@torch.library.custom_op(
    "bft_kernels::balanced_loss",
    mutates_args=(),
    schema=(
        "(Tensor loss, Tensor labelled, Tensor cu_seqlens, Tensor? num_items, "
        f"{SETTINGS_SCHEMA[BALANCED]}) -> ({_fields(BalancedLoss)})"
    ),
)
def balanced_loss_op(
    loss: Tensor, labelled: Tensor, cu_seqlens: Tensor, num_items: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """See :func:`bft_kernels.weighting.balanced_loss`. ``rest``: the options that it takes."""
    settings = Settings(**dict(zip(TAKEN[BALANCED], rest, strict=True)))
    own = offered("balanced_loss", settings.backend, traits_of(loss))
    function = own or weighting.balanced_loss
    cu_seqlens = boundaries_beside(cu_seqlens, loss.device)
    with torch.cuda.device_of(loss):
        return tuple(function(loss, labelled, cu_seqlens, num_items, settings))


def balanced_loss(
    loss: Tensor,  # [N], 0 where ignored
    labelled: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    num_items: Tensor | None,  # []
    settings: Settings,
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`."""
    options = [getattr(settings, name) for name in TAKEN[BALANCED]]
    return BalancedLoss(*balanced_loss_op(loss, labelled, cu_seqlens, num_items, *options))


@balanced_loss_op.register_fake
def _(
    loss: Tensor, labelled: Tensor, cu_seqlens: Tensor, num_items: Tensor | None, *rest: Any
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

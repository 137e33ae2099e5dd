"""A fused head for any Hugging Face causal LM: ``model(..., labels=...)`` without its logits.

No code here knows a model. A patched model runs its own ``forward`` with a stand-in where its
output embedding (the head) belongs. The stand-in keeps the hidden states it is given, so whatever
the model does between its body and its head still happens. The real head is then *called* on them
with a ``forward`` that computes the loss from its weight. Its hooks run around that call: sharded
training (FSDP, DeepSpeed) and offloading gather the weight there.

What the model does to its logits afterwards (softcap, scale) is measured instead of looked up: on
the first labelled call the stand-in answers with known numbers, and what becomes of them in the
model's output tells the transform. It must be one that the op knows, the same over the whole
vocabulary, or the call is refused. The model's own loss of those numbers tells whether it shifts
its labels. So nothing is computed twice, no dummy input is needed, and no rank of a sharded model
does more than the others. Only packed rows cost more, once: see :mod:`bft.isolation`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bft.guard import check_labelled, describe, guard
from bft.head import (
    LogitTransform,
    UnsupportedModel,
    causal_lm,
    check_weight,
    find_head,
    is_sharded,
    verify_linear,
)
from bft.isolation import check_documents_apart, kind_of
from bft.loss import IGNORE, Head, HeadLoss, LossFunction, batch_targets, is_labelled
from bft.measure import StandIn, read_shift, read_transform, run_body

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
_STATE = "_fused_head"
# The arguments that say where labels and documents lie.
_LABELS = ("labels", "shift_labels", "targets")
_PLACEMENT = (*_LABELS, "cu_seqlens", "cu_seq_lens_q", "position_ids")
# Kinds of packed calls in which a model was seen to keep documents apart, over all of its patches.
_APART: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass
class _State:
    """What a patched model carries. What in it refers to the model, copies and pickles rebind."""

    loss: LossFunction
    transform: LogitTransform | None
    shift: bool | None  # whether the model's own loss shifts its labels; None: not measured yet
    verify: bool
    allow_unlabelled: bool
    shadowing: Callable[..., Any] | None  # a forward that was an attribute of the instance
    parameters: tuple[str, ...]  # the own forward's arguments' names
    function: Callable[..., Any]  # the __func__ of what took its place
    apart: set[str] | None  # as in _APART; None: packed calls are not checked
    guards: Sequence[RemovableHandle] = ()
    guarded: nn.Module | None = None  # the head that is
    depth: int = 0  # calls that are running, one in the other
    logits_missed: bool = False  # whether a log line said that an evaluation gets no logits
    stats: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stats": None, "depth": 0}


class _Forward:
    """A patched model's forward: an object, which deepcopy and pickle tie to the copy.

    It passes for a bound method: accelerate wraps ``__func__``, and binds that again when it
    unwraps. No ``__wrapped__``: whoever unwraps through it would step past the patch.
    """

    @property
    def __func__(self) -> Callable[..., Any]:
        return _fused_forward

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _fused_forward(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer drops the columns that the signature does not name.
        return inspect.signature(_own_forward(self.model))


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    """What ``model.forward`` was before the patch."""
    shadowing = model.__dict__[_STATE].shadowing
    return type(model).forward.__get__(model) if shadowing is None else shadowing


# --- public functions ----------------------------------------------------------------------------


def patch_model(
    model: Model,
    loss: LossFunction,
    *,
    transform: LogitTransform | None = None,
    shift: bool | None = None,
    verify: bool = True,
    allow_unlabelled: bool = False,
) -> Model:
    """Makes ``model(..., labels=...)`` compute ``loss`` with the fused op, in place.

    The output then has ``loss`` and ``logits=None``, in ``train()`` and ``eval()`` alike.
    ``generate()`` and calls without labels are the model's own, but while it trains (``train()``
    mode, gradients enabled) whatever passes by the loss raises: see :mod:`bft.guard`.

    ``labels`` are aligned as the model's own loss aligns them, shifted or not. ``shift_labels``,
    ``cu_seqlens`` and ``position_ids`` that restart are honoured; see
    :func:`bft.loss.batch_targets`. ``num_items`` is
    what the loss divides by (documents or labelled tokens, as its ``normalize`` says).
    ``num_items_in_batch`` is Hugging Face's number of labelled tokens, and is refused by a loss
    that divides by documents.
    A router's auxiliary loss, where the model returns one, is added with the model's coefficient.
    ``use_cache`` is off with labels unless asked for: a cache costs memory, and with one
    transformers lets packed documents attend to each other.

    Args:
        model: a ``PreTrainedModel``, or one inside PEFT, DDP, FSDP or ``torch.compile`` wrappers.
        loss: usually a :class:`bft.loss.HeadLoss`.
        transform: what the model does to its logits; ``None``: measured on the first labelled call.
        shift: whether ``labels[t + 1]`` is what position ``t`` predicts; ``None``: measured on that
            call, too.
        verify: check on that call that the head is ``hidden @ weight.T + bias``, at two labels, and
            on the first packed one that documents do not see each other. With all three given, and
            with every later call, ``torch.compile`` sees one graph.
        allow_unlabelled: let the model train without the fused loss, too.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModel: an encoder-decoder, no output embedding, one with an adapter on it or
            quantised; or, on the first labelled call, logits that the op cannot express, labels of
            unknown alignment, packed documents that see each other.
        TypeError: ``loss`` cannot be called.
        RuntimeError: the model is patched already.
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable such as a HeadLoss")
    inner = causal_lm(model)
    if _STATE in inner.__dict__:
        raise RuntimeError("model: already patched; unpatch_model first, or use_loss to change it")
    outer, head = find_head(inner)
    if not is_sharded(head):
        check_weight(head)
    state = inner.__dict__[_STATE] = _State(
        loss=loss,
        transform=transform,
        shift=shift,
        verify=verify,
        allow_unlabelled=allow_unlabelled,
        shadowing=inner.__dict__.get("forward"),
        parameters=tuple(inspect.signature(inner.forward).parameters),
        function=_fused_forward,
        apart=_APART.setdefault(inner, set()) if verify else None,
    )
    inner.__dict__["forward"] = _Forward(inner)
    _watch(inner, state, outer)
    return model


def _watch(model: nn.Module, state: _State, head: nn.Module) -> None:
    """Guards the model's body and ``head``, and nothing else any more."""
    for handle in state.guards:
        handle.remove()
    state.guards, state.guarded = guard(model, head, state), head


def unpatch_model(model: Model) -> Model:
    """Undoes :func:`patch_model` exactly; does nothing to a model that is not patched.

    Raises:
        RuntimeError: something wrapped ``forward`` since (``accelerator.prepare`` with mixed
            precision does); unwrap that first.
    """
    inner = causal_lm(model)
    state = inner.__dict__.get(_STATE)
    if state is None:
        return model
    if getattr(inner.__dict__.get("forward"), "__func__", None) is not state.function:
        raise RuntimeError(
            f"model: its forward was wrapped after patch_model, by "
            f"{describe(inner.__dict__.get('forward'))}; unwrap that first"
        )
    del inner.__dict__[_STATE], inner.__dict__["forward"]
    if state.shadowing is not None:
        inner.__dict__["forward"] = state.shadowing
    for handle in state.guards:
        handle.remove()
    return model


@contextmanager
def use_loss(model: Model, loss: LossFunction) -> Iterator[Model]:
    """Within it ``model(..., labels=...)`` computes ``loss``, patched before or not."""
    state = causal_lm(model).__dict__.get(_STATE)
    if state is None:
        causal_lm(patch_model(model, loss)).__dict__[_STATE].logits_missed = True
        try:
            yield model
        finally:
            unpatch_model(model)
        return
    before, state.loss = state.loss, loss
    try:
        yield model
    finally:
        state.loss = before


def fused_loss(
    model: nn.Module, batch: Mapping[str, Any], loss: LossFunction
) -> tuple[Tensor, Any]:
    """``(loss, stats)`` of one batch that holds labels. The model is left as it was."""
    if not is_labelled(batch):  # the model's own forward would run
        raise ValueError("labels: the batch holds neither labels nor shift_labels")
    with use_loss(model, loss):
        value = model(**batch).loss
        return value, last_stats(model)


def last_stats(model: nn.Module) -> Any:
    """The statistics of a patched model's last labelled call, or ``None``.

    Not a field of the output: DDP, FSDP and accelerate rebuild outputs of the fields they know.
    """
    state = causal_lm(model).__dict__.get(_STATE)
    return None if state is None else state.stats


# --- one labelled call ---------------------------------------------------------------------------


def _fused_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: _State = model.__dict__[_STATE]
    call = dict(zip(state.parameters, args, strict=False)) | kwargs
    labelled = is_labelled(call)
    if not labelled:
        check_labelled(model, state)
    state.depth += 1
    try:
        if not labelled:
            return _own_forward(model)(*args, **kwargs)
        return _labelled_call(model, state, call)
    finally:
        state.depth -= 1


def _labelled_call(model: Any, state: _State, call: dict[str, Any]) -> Any:
    given = {name: call.get(name) for name in _PLACEMENT}
    target, cu_seqlens = batch_targets(given, shift=state.shift is not False)
    num_items = _num_items(state.loss, call)
    call = {k: v for k, v in call.items() if k not in _LABELS}
    if "cu_seqlens" not in state.parameters:
        call.pop("cu_seqlens", None)
    if call.get("use_cache") is None and hasattr(model.config.get_text_config(), "use_cache"):
        call["use_cache"] = False
    as_dict = call.pop("return_dict", None)
    if as_dict is None:
        as_dict = getattr(model.config, "return_dict", True)

    if cu_seqlens is not None and state.apart is not None:
        explicit = given["cu_seqlens"] is not None or given["cu_seq_lens_q"] is not None
        _check_apart(model, state.apart, call, target, cu_seqlens, explicit)
    output, stand_in = run_body(
        model,
        _own_forward(model),
        call,
        measure=state.transform is None or state.shift is None,
        labels_on=target.device if state.shift is None and "labels" in state.parameters else None,
    )
    hidden = stand_in.hidden_for(target)
    if stand_in.measure:
        _read_measured(model, state, output, stand_in)
        target, cu_seqlens = batch_targets(given, shift=state.shift is not False)

    outer, head = find_head(model)
    if outer is not state.guarded:  # the vocabulary was resized, say
        _watch(model, state, outer)
    loss = _call_head(state, head, hidden, target, cu_seqlens, num_items)
    auxiliary = _router_loss(model, output)
    if auxiliary is not None:
        loss = loss + _share(state.loss, target, cu_seqlens, num_items) * auxiliary.to(loss.device)
    _tell_of_logits(model, state)
    output = type(output)(**{**output, "loss": loss, "logits": None})
    return output if as_dict else output.to_tuple()


def _read_measured(model: Any, state: _State, output: Any, stand_in: StandIn) -> None:
    """What the answers of a measuring stand-in became: the logits' transform, the labels' shift."""
    name = type(model).__name__
    if state.transform is None:
        state.transform = read_transform(stand_in.answer, output.logits, name)
    if state.shift is not None:
        return
    own = output.get("loss")
    if own is None:
        state.shift = True  # it has no loss that could disagree
        return
    auxiliary = _router_loss(model, output)
    if auxiliary is not None:
        own = own - auxiliary.to(own.device)
    state.shift = read_shift(own, state.transform, stand_in.vocabulary, name)


def _check_apart(
    model: Any,
    seen: set[str],
    call: dict[str, Any],
    target: Tensor,
    cu_seqlens: Tensor,
    explicit: bool,
) -> None:
    """Tries once for each kind of packed call whether its documents see each other."""
    attention = getattr(model.config, "_attn_implementation", None)
    kind = kind_of(call, target, cu_seqlens, attention, given=explicit)
    if kind in seen:
        return

    def run(call: Mapping[str, Any]) -> Tensor:
        return run_body(model, _own_forward(model), call)[1].hidden_for(target)

    if check_documents_apart(model, run, call, target, cu_seqlens):
        seen.add(kind)


def _tell_of_logits(model: Any, state: _State) -> None:
    """Says once that an evaluation gets no logits: Trainer's metrics would see an empty tuple."""
    if model.training or torch.is_grad_enabled() or state.logits_missed:
        return
    if not isinstance(state.loss, HeadLoss):  # an evaluation of our own, for a while
        return
    state.logits_missed = True
    logger.warning(
        "%s was evaluated with labels and returned its loss without logits. What reads logits "
        "(Trainer.predict, compute_metrics) gets none of them: unpatch_model first",
        type(model).__name__,
    )


def _num_items(loss: LossFunction, call: dict[str, Any]) -> int | Tensor | None:
    """What the loss divides by, taken out of the arguments of a call."""
    num_items, tokens = call.pop("num_items", None), call.pop("num_items_in_batch", None)
    if num_items is not None:
        return num_items
    # Trainer passes it unasked: dividing a sum over documents by it would scale the loss down by
    # the length of a document, without a sign of it.
    normalize = getattr(loss, "normalize", "token")
    if tokens is not None and normalize != "token":
        raise ValueError(
            "num_items_in_batch: got the step's number of labelled tokens with a loss of "
            f"normalize={normalize!r}, expected normalize='token', or num_items: the step's number "
            "of documents"
        )
    return tokens


def _call_head(
    state: _State,
    head: nn.Module,
    hidden: Tensor,  # [B, T, D]
    target: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,
    num_items: int | Tensor | None,
) -> Tensor:
    """The loss, as the value of a call of ``head``: with its hooks, and its weight gathered."""
    # accelerate's hooks live in a forward of their own, which calls _old_forward inside.
    name = "_old_forward" if "_hf_hook" in head.__dict__ else "forward"
    own = getattr(head, name)
    assert state.transform is not None
    softcap, temperature = state.transform

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = check_weight(head)
        labels = target.to(hidden.device)
        if state.verify:  # on labelled positions: padding may hold anything
            rows = hidden.detach()[labels != IGNORE][:2]
            if len(rows):
                verify_linear(own, rows, weight, bias)
                state.verify = False
        loss, state.stats = state.loss(
            hidden, Head(weight, bias, softcap, temperature), labels, cu_seqlens, num_items
        )
        return loss

    shadowed = name in head.__dict__
    head.__dict__[name] = forward
    try:
        # What the call returns, not what forward made: a sharded head's post-forward hooks return
        # the tensor whose gradient gathers the weight again.
        return head(hidden)
    finally:
        del head.__dict__[name]
        if shadowed:
            head.__dict__[name] = own


def _router_loss(model: Any, output: Any) -> Tensor | None:
    """A mixture of experts' balancing loss, which models only add themselves when given labels."""
    auxiliary = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor):
        return None
    for place in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(place, name, None)
            if coefficient is not None:
                return coefficient * auxiliary
    raise UnsupportedModel(
        f"model: {type(model).__name__} returns an aux_loss, but neither it nor its config holds "
        "router_aux_loss_coef; turn output_router_logits off"
    )


def _share(
    loss: LossFunction, target: Tensor, cu_seqlens: Tensor | None, num_items: int | Tensor | None
) -> Tensor | float:
    """This call's part of the optimizer step: the auxiliary losses of all parts then average."""
    count = getattr(loss, "count_items", None)
    if num_items is None or count is None:
        return 1.0
    items = num_items.clamp_min(1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return count(target, cu_seqlens) / items

"""A fused head for any Hugging Face causal LM: ``model(..., labels=...)`` without its logits.

No code here knows a model. A patched model runs its own ``forward`` with a stand-in where its
output embedding (the head) belongs. The stand-in keeps the hidden states it is given, so whatever
the model does between its body and its head still happens. The real head is then *called* on them
with a ``forward`` that computes the loss from its weight. Its hooks run around that call: sharded
training (FSDP, DeepSpeed) and offloading gather the weight there.

What the model does to its logits afterwards (softcap, scale) is measured instead of looked up: on
the first labelled call the stand-in answers with known numbers, and what becomes of them in the
model's output tells the transform. It must be one that the op knows, the same over the whole
vocabulary, or the call is refused. So nothing is computed twice, no dummy input is needed, and no
rank of a sharded model does more than the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bft.head import (
    LogitTransform,
    StandIn,
    UnsupportedModel,
    causal_lm,
    check_weight,
    find_head,
    in_place_of,
    is_sharded,
    read_transform,
    verify_linear,
)
from bft.loss import IGNORE, Head, LossFunction, batch_targets

Model = TypeVar("Model", bound=nn.Module)
_STATE = "_fused_head"


@dataclass
class _State:
    """What a patched model carries. Nothing in it refers to the model but what deepcopy rebinds."""

    loss: LossFunction
    transform: LogitTransform | None
    verify: bool
    forward: Callable[..., Any]  # the model's own
    shadowed: bool  # whether that was an attribute of the instance
    parameters: tuple[str, ...]  # its arguments' names
    function: Callable[..., Any]  # what took its place
    stats: Any = None


# --- public functions ----------------------------------------------------------------------------


def patch_model(
    model: Model,
    loss: LossFunction,
    *,
    transform: LogitTransform | None = None,
    verify: bool = True,
) -> Model:
    """Makes ``model(..., labels=...)`` compute ``loss`` with the fused op, in place.

    The output then has ``loss`` and ``logits=None``, in ``train()`` and ``eval()`` alike; calls
    without labels, and ``generate()``, are the model's own. ``shift_labels``, ``cu_seqlens`` and
    ``position_ids`` that restart are honoured; see :func:`bft.loss.batch_targets`. ``num_items`` is
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
        verify: check on that call that the head is ``hidden @ weight.T + bias``, at two labels.
            With both given, and with every later call, ``torch.compile`` sees one graph.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModel: an encoder-decoder, no output embedding, one with an adapter on it or
            quantised; or, on the first labelled call, logits that the op cannot express.
        TypeError: ``loss`` cannot be called.
        RuntimeError: the model is patched already.
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable such as a HeadLoss")
    inner = causal_lm(model)
    if _STATE in inner.__dict__:
        raise RuntimeError("model: already patched; unpatch_model first, or use_loss to change it")
    head = find_head(inner)[1]
    if not is_sharded(head):
        check_weight(head)

    own = inner.forward
    signature = inspect.signature(own)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _fused_forward(self, *args, **kwargs)

    # Trainer drops the columns that the signature does not name. No __wrapped__: whoever unwraps
    # forward through it (accelerate) would step past the patch.
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[this, *signature.parameters.values()]
    )
    inner.__dict__[_STATE] = _State(
        loss=loss,
        transform=transform,
        verify=verify,
        forward=own,
        shadowed="forward" in inner.__dict__,
        parameters=tuple(signature.parameters),
        function=forward,
    )
    # A bound method, which deepcopy rebinds to the copy.
    inner.__dict__["forward"] = MethodType(forward, inner)
    return model


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
        raise RuntimeError("model: its forward was wrapped after patch_model; unwrap that first")
    del inner.__dict__[_STATE], inner.__dict__["forward"]
    if state.shadowed:
        inner.__dict__["forward"] = state.forward
    return model


@contextmanager
def use_loss(model: Model, loss: LossFunction) -> Iterator[Model]:
    """Within it ``model(..., labels=...)`` computes ``loss``, patched before or not."""
    state = causal_lm(model).__dict__.get(_STATE)
    if state is None:
        patch_model(model, loss)
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
    batch_targets(batch)  # without labels, the model's own forward would run
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
    if call.get("labels") is None and call.get("shift_labels") is None:
        return state.forward(*args, **kwargs)

    target, cu_seqlens = batch_targets(call)
    num_items = _num_items(state.loss, call)
    call = {k: v for k, v in call.items() if k not in ("labels", "shift_labels")}
    if "cu_seqlens" not in state.parameters:
        call.pop("cu_seqlens", None)
    if call.get("use_cache") is None and hasattr(model.config.get_text_config(), "use_cache"):
        call["use_cache"] = False
    as_dict = call.pop("return_dict", None)
    if as_dict is None:
        as_dict = getattr(model.config, "return_dict", True)

    outer, head = find_head(model)
    stand_in = StandIn(outer, head, measure=state.transform is None)
    with in_place_of(model, outer, stand_in):
        output = state.forward(**call, return_dict=True)
    hidden = stand_in.hidden_for(target)
    if state.transform is None:
        state.transform = read_transform(stand_in.answer, output.logits, type(model).__name__)

    loss = _call_head(state, head, hidden, target, cu_seqlens, num_items)
    auxiliary = _router_loss(model, output)
    if auxiliary is not None:
        loss = loss + _share(state.loss, target, cu_seqlens, num_items) * auxiliary.to(loss.device)
    output = type(output)(**{**output, "loss": loss, "logits": None})
    return output if as_dict else output.to_tuple()


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
    return count(target, cu_seqlens) / torch.as_tensor(num_items).clamp_min(1)

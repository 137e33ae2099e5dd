"""A fused head for any Hugging Face causal LM: ``model(..., labels=...)`` without its logits.

No code here knows a model. A patched model runs its own ``forward`` with a stand-in for its output
embedding (the head), which keeps the hidden states that it is given. The head itself is then
*called* on them with a ``forward`` that computes the loss from its weight. Its hooks run around
that call: sharded training (FSDP, DeepSpeed) and offloading gather the weight there.

What the model does to its logits (softcap, scale), and whether it shifts its labels, is measured on
the first labelled call: see :mod:`bft.measure`. So nothing is computed twice, and no rank of a
sharded model does more than the others. Only packed rows cost more, once: see
:mod:`bft.isolation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bft.guard import check_labelled, describe, unwatch, watch
from bft.head import LogitTransform, causal_lm, check_weight, find_head, is_sharded
from bft.labelled import labelled_call
from bft.loss import LossFunction, is_labelled

Model = TypeVar("Model", bound=nn.Module)
_STATE = "_fused_head"
# Kinds of packed calls in which a model was seen to keep documents apart, over all of its patches.
_APART: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass
class State:
    """What a patched model carries. Copies and pickles rebind what refers to the model."""

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
    logits_told: bool = False  # whether a log line said that an evaluation reads logits
    stats: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stats": None, "depth": 0}


class _Forward:
    """A patched model's forward: an object, which deepcopy and pickle tie to the copy.

    It passes for a bound method, since accelerate wraps ``__func__`` and binds it again. It has no
    ``__wrapped__``: whoever unwraps through it would step past the patch.
    """

    @property
    def __func__(self) -> Callable[..., Any]:
        return _fused_forward

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _fused_forward(self.model, *args, **kwargs)

    @property
    def __code__(self) -> Any:  # torch.export asks where a forward stands
        return _fused_forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer drops the columns that the signature does not name.
        own = inspect.signature(_own_forward(self.model))
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        weight = inspect.Parameter("token_weight", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = list(own.parameters.values())[len(named) :]
        return own.replace(parameters=[*named, weight, *rest])


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    """What ``model.forward`` was before the patch."""
    shadowing = model.__dict__[_STATE].shadowing
    return type(model).forward.__get__(model) if shadowing is None else shadowing


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

    The output then has ``loss`` and ``logits=None``. In ``eval()`` and without gradients it has
    logits, which are computed if something reads them (:mod:`bft.logits`; not inside of
    ``torch.compile``). ``generate()`` and calls without labels are the model's own, but a training
    step that goes past the loss raises: see :mod:`bft.guard`.

    ``labels`` are aligned as the model's own loss aligns them, shifted or not; ``shift_labels``,
    ``cu_seqlens`` and restarting ``position_ids`` are honoured (:func:`bft.loss.batch_targets`), as
    is ``token_weight [B, T]`` beside the labels, which multiplies each token's loss.
    The loss divides by ``num_items`` (documents or labelled tokens, as its ``normalize`` says), or
    by Hugging Face's ``num_items_in_batch``, which counts tokens. A router's auxiliary loss is
    added with the model's coefficient. ``use_cache`` is off with labels unless asked for: a cache
    costs memory, and with one transformers lets packed documents attend to each other.

    Args:
        model: a ``PreTrainedModel``, or one inside PEFT, DDP, FSDP or ``torch.compile`` wrappers.
        loss: usually a :class:`bft.loss.HeadLoss`.
        transform: what the model does to its logits; ``None``: measured on the first labelled call.
        shift: whether position ``t`` predicts ``labels[t + 1]``; ``None``: measured then, too.
        verify: check on that call that the head is ``hidden @ weight.T + bias``, at two labels, and
            on the first packed one that documents do not see each other. With all three given, and
            with every later call, ``torch.compile`` sees one graph.
        allow_unlabelled: let the model train without the fused loss, too.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModel: an encoder-decoder, no output embedding, one that is quantised or has an
            adapter of no low rank; or, on the first labelled call, logits that the op cannot
            express, labels of unknown alignment, packed documents that see each other.
        TypeError: ``loss`` cannot be called.
        RuntimeError: the model is patched already.
        ValueError: in a call, ``num_items_in_batch`` for a loss that divides by documents.
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable such as a HeadLoss")
    inner = causal_lm(model)
    if _STATE in inner.__dict__:
        raise RuntimeError("model: already patched; unpatch_model first, or use_loss to change it")
    outer, head = find_head(inner)
    if not is_sharded(head):
        check_weight(head)
    state = inner.__dict__[_STATE] = State(
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
    watch(inner, state, outer)
    return model


def state_of(model: nn.Module) -> State | None:
    """What the patch of a model carries; ``None`` without one."""
    return causal_lm(model).__dict__.get(_STATE)


def unpatch_model(model: Model) -> Model:
    """Undoes :func:`patch_model` exactly; does nothing to a model that is not patched.

    Raises:
        RuntimeError: something wrapped ``forward`` since (``accelerator.prepare`` with mixed
            precision does); unwrap that first.
    """
    inner, state = causal_lm(model), state_of(model)
    if state is None:
        return model
    now = inner.__dict__.get("forward")
    if getattr(now, "__func__", None) is not state.function:
        raise RuntimeError(
            f"model: its forward was wrapped after patch_model, by {describe(now)}; "
            "unwrap that first"
        )
    del inner.__dict__[_STATE], inner.__dict__["forward"]
    if state.shadowing is not None:
        inner.__dict__["forward"] = state.shadowing
    unwatch(state)
    return model


@contextmanager
def use_loss(model: Model, loss: LossFunction) -> Iterator[Model]:
    """Within it ``model(..., labels=...)`` computes ``loss``, patched before or not."""
    state = state_of(model)
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
    if not is_labelled(batch):  # the model's own forward would run
        raise ValueError("labels: the batch holds neither labels nor shift_labels")
    with use_loss(model, loss):
        value = model(**batch).loss
        return value, last_stats(model)


def last_stats(model: nn.Module) -> Any:
    """The statistics of a patched model's last labelled call, or ``None``."""
    # No field of the output: DDP, FSDP and accelerate rebuild outputs of known fields.
    state = state_of(model)
    return None if state is None else state.stats


def _fused_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: State = model.__dict__[_STATE]
    call = dict(zip(state.parameters, args, strict=False)) | kwargs
    labelled = is_labelled(call)
    if not labelled:
        check_labelled(model, state)
    state.depth += 1
    try:
        if not labelled:
            return _own_forward(model)(*args, **kwargs)
        return labelled_call(model, state, _own_forward(model), call)
    finally:
        state.depth -= 1

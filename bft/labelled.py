"""One labelled call of a patched model: its body, its head, the loss; see :mod:`bft.patch`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bft.adapter import low_rank
from bft.guard import watch
from bft.head import UnsupportedModel, check_weight, find_head, verify_linear
from bft.isolation import check_documents_apart
from bft.logits import DeferredLogits
from bft.loss import IGNORE, MISNAMED, Head, HeadLoss, LossFunction, Targets, batch_targets
from bft.measure import StandIn, read_shift, read_transform, run_body

if TYPE_CHECKING:
    from bft.patch import State

logger = logging.getLogger(__name__)

# The arguments that say where labels and documents lie.
_LABELS = ("labels", "shift_labels", "targets", "token_weight")
_PLACEMENT = (*_LABELS, "cu_seqlens", "cu_seq_lens_q", "position_ids")


def labelled_call(model: Any, state: "State", own: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The output of a call, its logits not computed; ``own`` is the model's forward."""
    given = {name: call.get(name) for name in _PLACEMENT}
    for name in ("weight", *MISNAMED):
        if call.get(name) is not None and name not in state.parameters:
            raise TypeError(f"{name}: the fused loss knows no such argument, expected token_weight")
    targets = batch_targets(given, shift=state.shift is not False)
    num_items = _num_items(state.loss, call)
    call = {k: v for k, v in call.items() if k not in _LABELS}
    if "cu_seqlens" not in state.parameters:
        call.pop("cu_seqlens", None)
    if call.get("use_cache") is None and hasattr(model.config.get_text_config(), "use_cache"):
        call["use_cache"] = False
    as_dict = call.pop("return_dict", None)
    if as_dict is None:
        as_dict = getattr(model.config, "return_dict", True)

    if targets.cu_seqlens is not None and state.apart is not None:

        def run(call: Mapping[str, Any]) -> Tensor:
            return run_body(model, own, call)[1].hidden_for(targets.target)

        explicit = given["cu_seqlens"] is not None or given["cu_seq_lens_q"] is not None
        check_documents_apart(model, run, call, targets, explicit=explicit, seen=state.apart)
    asks_for_loss = state.shift is None and "labels" in state.parameters
    output, stand_in = run_body(
        model,
        own,
        call,
        measure=state.transform is None or state.shift is None,
        labels_on=targets.target.device if asks_for_loss else None,
    )
    hidden = stand_in.hidden_for(targets.target)
    if stand_in.measure:
        _read_measured(model, state, output, stand_in)
        targets = batch_targets(given, shift=state.shift is not False)

    outer, head = find_head(model)
    if outer is not state.guarded:  # the vocabulary was resized, say
        watch(model, state, outer)
    loss = _call_head(state, outer, head, hidden, targets, num_items)
    auxiliary = _router_loss(model, output)
    if auxiliary is not None:
        loss = loss + _share(state.loss, targets, num_items) * auxiliary.to(loss.device)
    logits = None
    if not (model.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
        logits = _deferred_logits(model, state, (outer, head), hidden, stand_in.vocabulary)
    output = type(output)(**{**output, "loss": loss, "logits": logits})
    return output if as_dict else output.to_tuple()


def _read_measured(model: Any, state: "State", output: Any, stand_in: StandIn) -> None:
    """Learns the logits' transform and the labels' shift from what a stand-in's answer became."""
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


def _deferred_logits(
    model: Any,
    state: "State",
    head: tuple[nn.Module, nn.Module],  # of find_head
    hidden: Tensor,  # [B, T, D]
    vocabulary: int,
) -> Tensor | None:
    """An evaluation's logits, for whom they are read; their first batch is told of."""
    if not isinstance(state.loss, HeadLoss):  # an evaluation of our own, for a while
        return None

    def tell(logits: Tensor) -> None:
        if not state.logits_told:
            state.logits_told = True
            logger.warning(
                "%s was evaluated with labels, and the logits of the batch were read: %d bytes. "
                "Trainer keeps those of all batches, unless its preprocess_logits_for_metrics "
                "returns something smaller",
                type(model).__name__,
                logits.nbytes,
            )

    assert state.transform is not None
    return DeferredLogits(*head, hidden, vocabulary, state.transform, tell)


def _num_items(loss: LossFunction, call: dict[str, Any]) -> int | Tensor | None:
    """Takes what the loss divides by out of the arguments of a call."""
    num_items, tokens = call.pop("num_items", None), call.pop("num_items_in_batch", None)
    if num_items is not None:
        return num_items
    # Trainer passes it unasked. A sum over documents would be scaled down by a document's length.
    normalize = getattr(loss, "normalize", "token")
    if tokens is not None and normalize != "token":
        raise ValueError(
            "num_items_in_batch: got the step's number of labelled tokens with a loss of "
            f"normalize={normalize!r}, expected normalize='token', or num_items: the step's number "
            "of documents"
        )
    return tokens


def _call_head(
    state: "State",
    outer: nn.Module,
    head: nn.Module,
    hidden: Tensor,  # [B, T, D]
    targets: Targets,
    num_items: int | Tensor | None,
) -> Tensor:
    """The loss, as the value of a call of ``head``: with its hooks, and its weight gathered.

    Where PEFT has wrapped the head, the call goes through the wrapper, and that one's hooks.
    """
    assert state.transform is not None
    softcap, temperature = state.transform

    def wrapped(hidden: Tensor, own: Callable[..., Any], adapter_names: Any = None) -> Tensor:
        if adapter_names is not None:
            raise UnsupportedModel(
                f"adapter_names: got {adapter_names} with labels, expected None: PEFT has changed "
                "the head, and a labelled call has one head for all rows. Call set_adapter and "
                "pass the rows of one adapter at a time"
            )
        output: Tensor = head(hidden)
        return output

    def forward(hidden: Tensor, own: Callable[..., Any]) -> Tensor:
        weight, bias = check_weight(head)
        labels = targets.target.to(hidden.device)
        if state.verify:  # on labelled positions: padding may hold anything
            rows = hidden.detach()[labels != IGNORE][:2]
            if len(rows):
                verify_linear(own, rows, weight, bias)
                state.verify = False
        adapter = None if outer is head else low_rank(outer, hidden, weight)
        parts = Head(weight, bias, softcap, temperature, adapter)
        factors = () if targets.token_weight is None else (targets.token_weight.to(hidden.device),)
        loss, state.stats = state.loss(
            hidden, parts, labels, targets.cu_seqlens, num_items, *factors
        )
        return loss

    with _shadowed(head, forward):
        # What the call returns, not what forward made: a sharded head's post-forward hooks return
        # the tensor whose gradient gathers the weight again.
        if outer is head:
            return head(hidden)
        with _shadowed(outer, wrapped):
            return outer(hidden)


@contextmanager
def _shadowed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it a call of ``module`` runs ``forward``, which gets the module's own as well."""
    # accelerate's hooks live in a forward of their own, which calls _old_forward inside.
    name = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    own, shadowed = getattr(module, name), name in module.__dict__
    module.__dict__[name] = lambda hidden, **call: forward(hidden, own, **call)
    try:
        yield
    finally:
        del module.__dict__[name]
        if shadowed:
            module.__dict__[name] = own


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


def _share(loss: Any, targets: Targets, num_items: int | Tensor | None) -> Tensor | float:
    """This call's part of the optimizer step: the auxiliary losses of all parts then average."""
    count = getattr(loss, "count_items", None)
    if num_items is None or count is None:
        return 1.0
    items = num_items.clamp_min(1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return count(*targets[:2]) / items

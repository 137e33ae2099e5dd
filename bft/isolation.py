"""Whether documents that share a row see each other, found out by trying.

The loss keeps packed documents apart. Whether the layers do depends on the model, its attention and
the batch: many ignore ``position_ids`` that restart, and none knows a ``cu_seqlens`` that only the
loss reads. So the first packed batch of its kind is run twice without gradients, the second time
with other tokens in the earlier documents. The later document's hidden states must not change.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bft.head import UnsupportedModel
from bft.loss import IGNORE, Targets, is_distributed
from bft_kernels.weighting import cu_seqlens_from_position_ids

Run = Callable[[Mapping[str, Any]], Tensor]


@torch.no_grad()
def check_documents_apart(
    model: Any,
    run: Run,
    call: Mapping[str, Any],
    targets: Targets,
    *,
    explicit: bool,
    seen: set[str],
) -> None:
    """Raises UnsupportedModel if a document's hidden states depend on the documents before it.

    ``run`` maps a ``call``, the arguments of the model's forward without labels, to the states
    ``[B, T, D]`` that reach the head. ``explicit`` says that ``cu_seqlens`` was given, and not read
    off ``position_ids``. ``seen`` are kinds of calls that need no trial any more. This one is added
    if the batch could tell: some row holds a labelled document behind another one.
    """
    target, cu_seqlens = targets[:2]
    assert cu_seqlens is not None
    kind = _kind_of(model, call, target, cu_seqlens, explicit)
    if kind in seen:
        return
    earlier, judged, later = _split(call, targets)
    changed = other_tokens(call, earlier)
    if not _most_of_ranks(model, float(changed is not None and bool(judged.any()))):
        return
    with evaluation_mode(model):
        own = run(call)[judged]  # [n, D]
        noise = _change(model, own, run({**call, **(other_tokens(call, later) or {})})[judged])
        change = _change(model, own, run({**call, **(changed or {})})[judged])
    # Mostly there is no noise, and no change is allowed. But a mixture's experts may group rows
    # otherwise, and then round otherwise. Later tokens show how much: nothing else depends on them,
    # except in a model that looks both ways.
    eps = torch.finfo(own.dtype).eps
    if change > min(max(8 * noise, eps / 4, 1e-6), max(4 * eps, 1e-5)):
        raise UnsupportedModel(
            f"model: packed documents see each other in {type(model).__name__}: other tokens in a "
            f"row's earlier documents change the hidden states of a later one by {change:.1e} of "
            f"their size; expected no change. {_way_out(call)}"
        )
    seen.add(kind)


def _split(call: Mapping[str, Any], targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """What stands before each row's last labelled document, its first half, and the rest.

    Each is ``[B, T]``. Padding that a mask hides is in none of them.
    """
    target, cu_seqlens, _ = targets
    assert cu_seqlens is not None
    places = torch.arange(target.numel(), dtype=torch.int64, device=target.device)
    bounds = cu_seqlens.to(target.device, torch.int64)
    document = targets.documents().view(target.shape)
    last = document.masked_fill(target == IGNORE, -1).amax(1, keepdim=True)
    mask = call.get("attention_mask")
    shown = torch.ones_like(target, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == target.shape:
        shown = mask.to(target.device) != 0
    # At its boundary a document that sees another one is changed most: there is a half at least.
    first, end = bounds[last.clamp_min(0)], bounds[last.clamp_min(0) + 1]
    half = (places.view(target.shape) - first) * 2 <= end - first
    earlier = (document < last) & shown
    judged = (document == last) & half & shown & earlier.any(1, keepdim=True)
    later = (document >= last) & ~half & shown
    return earlier, judged, later


def _change(model: nn.Module, before: Tensor, after: Tensor) -> float:
    """The largest change of a hidden state ``[n, D]``, as a part of its norm; of all ranks."""
    if not len(before):
        return _most_of_ranks(model, 0.0)
    norm = before.float().norm(dim=1).clamp_min(1e-30)
    return _most_of_ranks(model, float(((after - before).float().norm(dim=1) / norm).amax()))


def other_tokens(call: Mapping[str, Any], where: Tensor) -> dict[str, Tensor] | None:
    """The inputs with each token at ``where [B, T]`` replaced by another one of the batch."""
    ids = call.get("input_ids")
    if ids is None:
        embeds = call.get("inputs_embeds")
        return None if embeds is None else {"inputs_embeds": embeds.where(~where[..., None], 1.0)}
    low, high = ids.min(), ids.max()
    if bool(low == high):
        return None
    return {"input_ids": torch.where(where, torch.where(ids == low, high, low), ids)}


def _kind_of(
    model: Any, call: Mapping[str, Any], target: Tensor, cu_seqlens: Tensor, explicit: bool
) -> str:
    """What decides whether documents see each other, besides the model: one trial for each.

    That is the attention, the arguments with their dimensions and types, what switches say, whether
    there is one row (flash attention looks at ``position_ids`` only then), and whether the
    boundaries are those that ``position_ids`` show.
    """
    parts = [str(getattr(model.config, "_attn_implementation", None))]
    for name, value in sorted(call.items()):
        if isinstance(value, Tensor):
            parts.append(f"{name} {value.dim()} {value.dtype} {value.shape[:1] == (1,)}")
        elif value is not None:
            parts.append(f"{name} {value if isinstance(value, bool | str) else type(value)}")
    positions = call.get("position_ids")
    if explicit and isinstance(positions, Tensor) and positions.dim() == 2:
        shown = cu_seqlens_from_position_ids(positions.expand(target.shape))
        if not torch.equal(shown.to(cu_seqlens.device, torch.int64), cu_seqlens.to(torch.int64)):
            parts.append("boundaries beside position_ids")
    return ", ".join(parts)


def _most_of_ranks(model: nn.Module, here: float) -> float:
    """``here``, or the largest of all ranks where a forward of one waits for all the others."""
    distributed = is_distributed() and dist.get_world_size() > 1
    parameters = list(model.parameters())
    if not distributed or not any(
        hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in parameters
    ):
        return here
    value = torch.tensor(here, dtype=torch.float32, device=parameters[0].device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _way_out(call: Mapping[str, Any]) -> str:
    if call.get("attention_mask") is not None:
        other = (
            "leave attention_mask out: transformers reads document boundaries from position_ids "
            "only where no mask is given"
        )
    elif call.get("position_ids") is None:
        other = (
            "pass position_ids that restart with each document: what was passed reaches the loss "
            "and not this model's attention"
        )
    else:
        other = (
            "choose an attention implementation that keeps documents apart: with this one "
            "position_ids that restart do not"
        )
    return f"Give each document a row of its own (bft train: without --packing), or {other}."


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in ``eval()``; then each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

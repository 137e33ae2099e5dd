"""Whether documents that share a row see each other, found out by trying.

The loss keeps packed documents apart. Whether the model's layers do depends on the model, on its
attention and on what the batch holds: many ignore ``position_ids`` that restart, and no layer is
told of a ``cu_seqlens`` that only the loss reads. So the first packed batch is run twice, without
gradients: as it is, and with other tokens in the earlier documents of each row. The hidden states
of the later document must not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bft.head import UnsupportedModel
from bft.loss import IGNORE

Run = Callable[[Mapping[str, Any]], Tensor]


@torch.no_grad()
def check_documents_apart(
    model: nn.Module,
    run: Run,
    call: Mapping[str, Any],
    target: Tensor,  # [B, T]
    cu_seqlens: Tensor,  # [S + 1]
) -> bool:
    """Raises UnsupportedModel if a document's hidden states depend on the documents before it.

    Args:
        model: the model, whose modes are ``eval()`` meanwhile.
        run: ``call -> hidden [B, T, D]``, the states that reach the head.
        call: the arguments of the model's forward, without labels.
        target: ``[B, T]`` int64; unlabelled positions (padding, too) are not compared.
        cu_seqlens: ``[S + 1]``, the boundaries that the loss goes by.

    Returns:
        Whether the batch could tell: some row holds a labelled document behind another one.
    """
    earlier, judged = _split(target, cu_seqlens)
    other = _other_tokens(call, earlier)
    if not _most_of_ranks(model, float(other is not None and bool(judged.any()))):
        return False
    with evaluation_mode(model):
        before = run(call)[judged]  # [n, D]
        after = run(call if other is None else {**call, **other})[judged]
    change = 0.0
    if len(before):
        change = float((after - before).abs().amax() / before.abs().amax().clamp_min(1e-30))
    change = _most_of_ranks(model, change)
    # Mostly none at all. But the rows of a product may be grouped otherwise (a mixture's experts),
    # and then round otherwise.
    if not change < max(4 * torch.finfo(before.dtype).eps, 1e-5):
        raise UnsupportedModel(
            f"model: packed documents see each other in {type(model).__name__}: other tokens in a "
            f"row's earlier documents change the hidden states of a later one by {change:.1e} of "
            f"their size; expected no change. {_why(call)}"
        )
    return True


def _split(target: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's last labelled document: what stands before it, and its labels; ``[B, T]``."""
    places = torch.arange(target.numel(), dtype=torch.int64, device=target.device)
    ends = cu_seqlens[1:].to(target.device, torch.int64)
    document = torch.bucketize(places, ends, right=True).view(target.shape)
    labelled = target != IGNORE
    last = document.masked_fill(~labelled, -1).amax(1, keepdim=True)
    earlier = document < last
    return earlier, labelled & (document == last) & earlier.any(1, keepdim=True)


def _other_tokens(call: Mapping[str, Any], where: Tensor) -> dict[str, Tensor] | None:
    """The inputs with each token at ``where [B, T]`` replaced by another one of the batch."""
    ids = call.get("input_ids")
    if ids is None:
        embeds = call.get("inputs_embeds")
        return None if embeds is None else {"inputs_embeds": embeds.where(~where[..., None], 1.0)}
    low, high = ids.min(), ids.max()
    if bool(low == high):
        return None
    return {"input_ids": torch.where(where, torch.where(ids == low, high, low), ids)}


def _most_of_ranks(model: nn.Module, here: float) -> float:
    """``here``, or the largest of all ranks where a forward of one waits for all the others."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    parameters = list(model.parameters())
    if not distributed or not any(
        hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in parameters
    ):
        return here
    value = torch.tensor(here, dtype=torch.float32, device=parameters[0].device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _why(call: Mapping[str, Any]) -> str:
    pad = "Give each document a row of its own (bft train: without --packing)"
    if call.get("attention_mask") is not None:
        return (
            f"{pad}, or leave attention_mask out: transformers reads document boundaries from "
            "position_ids only where no mask is given."
        )
    if call.get("position_ids") is None:
        return (
            f"{pad}, or pass position_ids that restart with each document: what was passed "
            "reaches the loss and not this model's attention."
        )
    return (
        f"{pad}, or choose an attention implementation that keeps documents apart: with this one "
        "position_ids that restart do not."
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`eval()` for the while; each module gets its own mode back, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

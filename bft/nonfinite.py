"""Losses and gradients that are no numbers: the step is not taken, and its records are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bft.data import AnswerDataset
from bft.encode import Example
from bft.loss import aligned
from bft.ranks import gathered, largest

_NAMED = 8  # records, in a message


class NonFinite(RuntimeError):
    """The run's numbers are no longer numbers."""


def what_is_not_finite(accelerator: Any, values: dict[str, float]) -> str | None:
    """Which of a step's values is not finite, in words."""
    if not math.isfinite(values["loss"]):
        return f"the loss is {values['loss']}"
    # A scaler of float16 gradients expects overflows, and leaves such steps out itself.
    if not math.isfinite(values["grad_norm"]) and accelerator.scaler is None:
        return f"the norm of the gradient is {values['grad_norm']}"
    return None


def suspects(
    accelerator: Any,
    model: nn.Module,
    dataset: AnswerDataset,
    records: Sequence[int],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
) -> str:
    """Names those of a step's records whose own loss is not finite; all where none is.

    ``records`` are this rank's; every rank has as many. torch's random state is left as it was.
    """
    device = accelerator.device
    bad = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for record in records:
            batch = {name: value.to(device) for name, value in collate([dataset[record]]).items()}
            if not bool(torch.isfinite(model(**aligned(batch)).loss)):
                bad.append(dataset[record].where)
    everyone = gathered([dataset[record].where for record in records])
    named = gathered(bad) or everyone
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"{len(named)} of {len(everyone)} records: {', '.join(named[:_NAMED])}{more}"


def broken_parameter(accelerator: Any, model: nn.Module) -> str | None:
    """The name of a trained parameter that holds an infinity or NaN on any rank."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    place = largest(accelerator, first_broken([p for _, p in trained]))
    return trained[place - 1][0] if place else None


def first_broken(parameters: Sequence[nn.Parameter]) -> int:
    """Which is the first that holds an infinity or NaN (of a sharded one, here), from 1; or 0."""
    whole = [torch.isfinite(getattr(p, "to_local", p.detach)()).all() for p in parameters]
    if not whole:
        return 0
    places = torch.stack(whole).logical_not().nonzero()
    return int(places[0]) + 1 if len(places) else 0

"""Losses and gradients that are not finite: the step is not taken, and its records are named."""

import logging
import math
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn

from bft.checkpoint import checkpoint_folders
from bft.loss import aligned
from bft.ranks import largest

if TYPE_CHECKING:
    from bft.run import Run

logger = logging.getLogger(__name__)

_NAMED = 8  # records, in a message


class NonFinite(RuntimeError):
    """A number of the run is infinite or NaN."""


def what_is_not_finite(accelerator: Any, values: dict[str, float]) -> str | None:
    """Which of a step's values is not finite, in words."""
    if not math.isfinite(values["loss"]):
        return f"the loss is {values['loss']}"
    # A scaler of float16 gradients expects overflows, and leaves such steps out itself.
    if not math.isfinite(values["grad_norm"]) and accelerator.scaler is None:
        return f"the norm of the gradient is {values['grad_norm']}"
    return None


def leave_out(run: "Run", step: int, wrong: str) -> None:
    """Warns that the update of this step is left out, and of which records it was.

    Raises:
        NonFinite: the configuration has the run stop instead.
    """
    message = f"step {step + 1}: {wrong}; {_suspects(run, step)}"
    if run.config.on_nonfinite == "stop":
        found = checkpoint_folders(run.config.output_dir)
        again = f"--resume (from {found[-1].name}) with" if found else "start again with"
        raise NonFinite(
            f"{message}. No model is written; {again} --on-nonfinite skip, or start anew with a "
            "lower --learning-rate"
        )
    if run.accelerator.is_main_process:
        logger.warning("%s. This step's update is left out", message)


def _suspects(run: "Run", step: int) -> str:
    """Names the step's records whose own loss is not finite, or all; keeps torch's random state."""
    batches, device = copy(run.batches), run.accelerator.device
    batches.start(step, step + 1)
    records = [run.dataset[record] for batch in batches for record in batch]  # every rank's as many
    bad = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for record in records:
            batch = aligned(send_to_device(run.collate([record]), device))
            if not bool(torch.isfinite(run.model(**batch).loss)):
                bad.append(record.where)
    everyone = gather_object([record.where for record in records])
    named = gather_object(bad) or everyone
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"{len(named)} of {len(everyone)} records: {', '.join(named[:_NAMED])}{more}"


def broken_parameter(accelerator: Any, model: nn.Module) -> str | None:
    """The name of a trained parameter that holds an infinity or NaN on any rank."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    place = largest(accelerator, first_broken([p for _, p in trained]))
    return trained[place - 1][0] if place else None


def first_broken(parameters: Sequence[nn.Parameter]) -> int:
    """Counts from 1 to the first that holds an infinity or NaN (here, if sharded); 0: none does."""
    whole = [torch.isfinite(getattr(p, "to_local", p.detach)()).all() for p in parameters]
    if not whole:
        return 0
    places = torch.stack(whole).logical_not().nonzero()
    return int(places[0]) + 1 if len(places) else 0

"""The losses that ``python -m benchmarks train`` compares, as functions of a model's head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.providers.registry import Case, why_not
from benchmarks.shapes import Problem
from bft.config import TrainConfig
from bft.head import UnsupportedModel
from bft.loss import IGNORE, Head, LossFunction

Weighting = Literal["plain", "bft"]
PEERS = ("torch chunked", "liger chunked", "liger fused", "cut-cross-entropy", "trl")


@dataclass(frozen=True)
class StepLoss:
    """One loss of a fine-tuning step.

    ``make`` gives the function that :func:`bft.patch_model` puts at the model's head, or ``None``
    for what the model itself does with ``labels=``.
    """

    name: str
    weighting: Weighting  # the mean over tokens, or Balanced Fine-Tuning's over documents
    make: Callable[[TrainConfig], LossFunction | None]
    peer: Case | None = None  # of `python -m benchmarks loss`, which says where it can run

    @property
    def label(self) -> str:
        return f"{self.name}, {self.weighting}"

    def why_missing(self, device: str, dtype: torch.dtype = torch.float32) -> str:
        """Why it cannot run here, empty if it can."""
        return "" if self.peer is None else why_not(self.peer, device, dtype)


def _at_head(case: Case, window: int) -> LossFunction:
    """What ``python -m benchmarks loss`` measures; rows of a batch are documents."""

    def loss(
        hidden: Tensor,  # [B, T, D]
        head: Head,
        target: Tensor,  # [B, T]
        cu_seqlens: Tensor | None,
        num_items: int | Tensor | None,
    ) -> tuple[Tensor, Any]:
        if head.bias is not None or head.softcap is not None or head.temperature != 1:
            raise UnsupportedModel(
                "head: got one with a bias, softcap or temperature, expected hidden @ weight.T: "
                "this loss expresses nothing else"
            )
        labelled = target != IGNORE
        tokens = hidden[labelled], head.weight, target[labelled]
        document = tokens[2].numel() // target.shape[0]  # rows have the same number of labels
        return case(Problem(*tokens, document=document, window=window)), None

    return loss


def _peer(name: str, weighting: Weighting) -> StepLoss:
    case = Case(name, weighting)
    return StepLoss(name, weighting, lambda settings: _at_head(case, settings.window), case)


def _ours(weighting: Weighting, gradient: Literal["exact", "sampled"]) -> StepLoss:
    def make(settings: TrainConfig) -> LossFunction:
        if weighting == "bft":
            return replace(settings, scheme="bft", gradient=gradient).loss()
        plain = replace(settings, scheme="sft", normalize="token", gradient=gradient)
        return plain.loss()

    return StepLoss(gradient, weighting, make)


def _all(weighting: Weighting, eager: StepLoss) -> list[StepLoss]:
    return [
        eager,
        *(_peer(name, weighting) for name in PEERS),
        _ours(weighting, "exact"),
        _ours(weighting, "sampled"),
    ]


LOSSES = (
    *_all("plain", StepLoss("eager", "plain", lambda _: None)),
    *_all("bft", _peer("eager", "bft")),
)
NAMES = tuple(dict.fromkeys(loss.name for loss in LOSSES))


def find(label: str) -> StepLoss:
    """By :attr:`StepLoss.label`."""
    return next(loss for loss in LOSSES if loss.label == label)

"""The losses that ``python -m benchmarks train`` compares, as functions of a model's head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.providers.registry import Case, why_not
from benchmarks.shapes import Problem
from bft.config import TrainConfig
from bft.head import UnsupportedModel
from bft.loss import IGNORE, Head, LossFunction


def _at_head(case: Case, window: int) -> LossFunction:
    """The loss that a case measures, at a head; rows of a batch ``[B, T]`` are documents."""

    def loss(hidden: Tensor, head: Head, target: Tensor, *_: Any) -> tuple[Tensor, Any]:
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


PEERS = ("torch chunked", "liger chunked", "liger fused", "cut-cross-entropy", "trl")
OURS = ("exact", "sampled")
NAMES = ("eager", *PEERS, *OURS)


@dataclass(frozen=True)
class StepLoss:
    """One loss of a fine-tuning step."""

    name: str
    weighting: Literal["plain", "bft"]  # the mean over tokens, or balanced over documents

    @property
    def label(self) -> str:
        return f"{self.name}, {self.weighting}"

    def why_missing(self, device: str, dtype: torch.dtype = torch.float32) -> str:
        """Why the loss cannot run here; empty if it can."""
        case = Case(self.name, self.weighting)
        return "" if self.name in OURS else why_not(case, device, dtype)

    def make(self, settings: TrainConfig) -> LossFunction | None:
        """The loss that :func:`bft.patch_model` takes; ``None`` for the model's own."""
        if self.name in OURS:
            plain = {"scheme": "sft", "normalize": "token"}
            scheme: dict[str, Any] = plain if self.weighting == "plain" else {"scheme": "bft"}
            return replace(settings, gradient=self.name, **scheme).loss()
        if self.label == "eager, plain":
            return None
        return _at_head(Case(self.name, self.weighting), settings.window)


LOSSES = tuple(StepLoss(name, weighting) for weighting in ("plain", "bft") for name in NAMES)


def find(label: str) -> StepLoss:
    """The loss with this :attr:`StepLoss.label`."""
    return next(loss for loss in LOSSES if loss.label == label)

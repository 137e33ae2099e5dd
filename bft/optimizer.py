"""AdamW, its learning rate's schedule, and the clipping of gradients."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from bft.config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module, steps: int) -> tuple[Any, Any]:
    """The optimizer of a run of so many steps, and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
    )
    warmup = round(config.warmup_ratio * steps)

    def factor(step: int) -> float:
        """From ``1 / (warmup + 1)`` up to 1, then along a cosine towards 0 after the last step."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; weight decay applies to matrices, not to norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def clip(accelerator: Accelerator, model: nn.Module, max_norm: float) -> float:
    """Clips the gradients; returns their norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return float(accelerator.clip_grad_norm_(model.parameters(), limit))

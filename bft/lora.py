"""LoRA adapters on a model, where a run asks for them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from bft.config import SettingError

EVERYWHERE = ("all-linear",)


def add_adapters(
    model: Any, rank: int, alpha: float | None = None, targets: tuple[str, ...] = EVERYWHERE
) -> Any:
    """The model with adapters of this rank; its own parameters are frozen.

    ``alpha`` is LoRA's scale, twice the rank if not given.
    Raises SettingError naming the modules that exist if a target is none of them.
    """
    from peft import LoraConfig, get_peft_model

    everywhere = targets == EVERYWHERE
    if not everywhere:
        _check_targets(model, targets)
    scale: Any = 2 * rank if alpha is None else alpha
    lora = LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules="all-linear" if everywhere else list(targets),
        task_type="CAUSAL_LM",
    )
    model.enable_input_require_grads()
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # a module of a kind that PEFT has no adapter for
        raise SettingError(f"lora_targets: got {' '.join(targets)}: {error}") from error


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """PEFT takes a list as soon as one of its names is a module's, or the end of its path."""
    paths = [path for path, _ in model.named_modules() if path]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            ends = {
                path.rpartition(".")[2]
                for path, module in model.named_modules()
                if isinstance(module, nn.Linear | nn.Embedding | Conv1D)
                and module is not model.get_output_embeddings()
            }
            raise SettingError(
                f"lora_targets: got {target!r}, which is no module of {type(model).__name__}; "
                f"expected all-linear alone, or some of {', '.join(sorted(ends))}"
            )

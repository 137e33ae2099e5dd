"""Fine-tuning of Hugging Face causal LMs with Balanced Fine-Tuning, DFT or SFT."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bft.loss import HeadLoss
    from bft.patch import fused_loss, patch_model, unpatch_model

__all__ = ["HeadLoss", "fused_loss", "patch_model", "unpatch_model"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: torch takes a second, in which the command can be stopped."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("bft.loss" if name == "HeadLoss" else "bft.patch"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

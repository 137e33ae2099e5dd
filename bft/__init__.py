"""Fine-tuning of Hugging Face causal LMs with Balanced Fine-Tuning, DFT or SFT."""

from bft.loss import HeadLoss
from bft.patch import fused_loss, patch_model, unpatch_model

__all__ = ["HeadLoss", "fused_loss", "patch_model", "unpatch_model"]

"""TRL's DPO with log-probabilities, of policy and reference, from ``linear_nll``."""

from collections.abc import Mapping
from typing import Any

from accelerate_loop import small_model
from datasets import Dataset
from transformers import ByT5Tokenizer
from trl import DPOConfig, DPOTrainer
from trl_head import fused_by_bft


class FusedDPOTrainer(DPOTrainer):
    """``DPOTrainer`` with our head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with fused_by_bft("dpo_trainer"):
            super().__init__(*args, **kwargs)


def build(kind: Any, folder: str, settings: Mapping[str, Any], **options: Any) -> DPOTrainer:
    """A trainer on a few preferences, for two steps."""
    small_model(384).save_pretrained(folder)  # the reference is read from where the policy is
    plain = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    rows = [
        {"prompt": f"Is {n} even? ", "chosen": "yes" if n % 2 == 0 else "no", "rejected": "perhaps"}
        for n in range(8)
    ]
    return kind(
        folder,
        args=DPOConfig(folder, **plain | {"use_cpu": True, "bf16": False} | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=ByT5Tokenizer(),
        **options,
    )


if __name__ == "__main__":
    build(FusedDPOTrainer, "runs/dpo", {}).train()

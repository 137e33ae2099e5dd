"""TRL's GRPO with log-probabilities and entropies from ``linear_nll``."""

from typing import Any

from accelerate_loop import small_model
from datasets import Dataset
from transformers import ByT5Tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_head import fused_by_bft


class FusedGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with our head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with fused_by_bft("grpo_trainer"):
            super().__init__(*args, **kwargs)
        if self.entropy_coef != 0 or self.use_adaptive_entropy:
            raise ValueError("entropy_coef: expected 0, since these entropies have no gradient")


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward: the vowels of each completion."""
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


def build(kind: type[GRPOTrainer], folder: str, **settings: Any) -> GRPOTrainer:
    """A trainer on a few prompts."""
    plain = {
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    plain |= {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8}
    small_model(384).save_pretrained(folder)  # the reference is read from where the policy is
    return kind(
        folder,
        reward_funcs=vowels,
        args=GRPOConfig(folder, **plain | {"save_strategy": "no", "beta": 0.1} | settings),
        train_dataset=Dataset.from_list([{"prompt": f"Say {n}: "} for n in range(8)]),
        processing_class=ByT5Tokenizer(),
    )


if __name__ == "__main__":
    build(FusedGRPOTrainer, "runs/grpo").train()

"""TRL's GRPO with log-probabilities and entropies from ``linear_nll``."""

from collections.abc import Mapping
from typing import Any

from accelerate_loop import small_model
from datasets import Dataset
from transformers import ByT5Tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_head import fused_by_bft


class FusedGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with our head and options of ``linear_nll``.

    An entropy bonus (``entropy_coef``) needs ``options={"differentiable": ("entropy",)}``.
    """

    def __init__(self, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(options or {})
        with fused_by_bft("grpo_trainer", **options):
            super().__init__(*args, **kwargs)
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        if bonus and "entropy" not in options.get("differentiable", ()):
            raise ValueError("options: expected differentiable=('entropy',) with an entropy bonus")


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward: the vowels of each completion."""
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


def build(kind: Any, folder: str, settings: Mapping[str, Any], **options: Any) -> GRPOTrainer:
    """A trainer on a few prompts, for two steps."""
    small_model(384).save_pretrained(folder)  # the reference is read from where the policy is
    plain = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    plain |= {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8}
    return kind(
        folder,
        reward_funcs=vowels,
        args=GRPOConfig(folder, **plain | {"use_cpu": True, "bf16": False, "beta": 0.1} | settings),
        train_dataset=Dataset.from_list([{"prompt": f"Say {n}: "} for n in range(8)]),
        processing_class=ByT5Tokenizer(),
        **options,
    )


if __name__ == "__main__":
    build(FusedGRPOTrainer, "runs/grpo", {}).train()

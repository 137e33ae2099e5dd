"""TRL's ``SFTTrainer`` with the fused loss."""

from types import SimpleNamespace
from typing import Any

from trl.trainer.sft_trainer import SFTTrainer

from bft.head import causal_lm
from bft.integrations.transformers import BFTTrainer, labelled
from bft.patch import last_stats


class BFTSFTTrainer(BFTTrainer, SFTTrainer):
    """``trl.SFTTrainer``, trained with a :class:`bft.HeadLoss`.

    It takes what ``SFTTrainer`` takes, and the fields of ``HeadLoss`` as keyword arguments: see
    :class:`bft.integrations.transformers.BFTTrainer`. Logs hold TRL's own means, too.

    Raises:
        ValueError: also for a ``loss_type``, in whose place is ``scheme``.
    """

    args: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (loss_type := self.args.loss_type) != "nll":
            raise ValueError(
                f"loss_type: got {loss_type!r}, expected none: scheme={loss_type!r} and "
                "normalize='token' are that loss"
            )
        model = causal_lm(self.model)
        if hasattr(model, "router_aux_loss_coef"):  # TRL's own setting is for its own forward
            model.router_aux_loss_coef = self.router_aux_loss_coef

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "token_weight" not in self._signature_columns:  # a collator may read it
            self._signature_columns.append("token_weight")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.aux_loss_enabled:  # some models look at the argument only
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        stats = last_stats(model)

        def scored(**_: Any) -> SimpleNamespace:
            """What TRL's own forward would return, for its metrics."""
            return SimpleNamespace(
                log_probs=-stats.nll,
                entropy=stats.entropy,
                is_top1=stats.correct,
                label_mask=labelled(inputs, stats),
                aux_loss=getattr(outputs, "aux_loss", None),
            )

        SFTTrainer.compute_loss(self, scored, dict(inputs), num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

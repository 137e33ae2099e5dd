"""torchtune: its recipe of full fine-tuning with our loss.

``tune cp full_finetune_single_device full_finetune_single_device.py`` puts torchtune's own beside
this file, which runs as it does: ``tune run torchtune_recipe.py --config ...``.
"""

import sys
from typing import Any

from full_finetune_single_device import FullFinetuneRecipeSingleDevice
from torch import Tensor
from torchtune import config

from bft_kernels import linear_cross_entropy


class FusedRecipe(FullFinetuneRecipeSingleDevice):
    """The recipe of a model whose head is a linear layer of its own, not tied."""

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        labels, model = batch.pop("labels"), self._model
        model.unembed = lambda hidden: model.norm(hidden)  # the weights and their names stay
        with self.activations_handling_ctx:
            hidden = model(**batch)
        del model.unembed
        ignored = self._loss_fn.ignore_index
        weight = model.output.weight
        return linear_cross_entropy(hidden, weight, labels, shift=True, ignore_index=ignored)


@config.parse
def main(cfg: Any) -> None:
    """What the recipe's own ``main`` does."""
    recipe = FusedRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(main())

"""Lightning: a module whose training step returns the balanced loss of hidden states."""

import lightning
import torch
from pytorch_loop import Model, batches
from torch import Tensor

from bft_kernels import BalancedLinearCrossEntropyLoss


class FineTuning(lightning.LightningModule):
    """Balanced fine-tuning of a model that returns hidden states. A row is a document.

    Lightning divides the loss by ``accumulate_grad_batches``. That is right for this loss if all
    batches have as many documents; otherwise count them and pass ``num_items``, as in
    ``pytorch_loop.py``, under ``automatic_optimization = False``.
    """

    def __init__(self, model: Model, window: int = 4) -> None:
        super().__init__()
        self.model = model
        self.loss = BalancedLinearCrossEntropyLoss(window=window, shift=True, return_stats=True)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, labels = self.model(batch["input_ids"]), batch["labels"]
        loss, stats = self.loss(hidden, self.model.head.weight, labels)
        labelled = stats.nll > 0
        self.log("confidence", stats.confidence[labelled].mean())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(model: Model, data: list[dict[str, Tensor]]) -> list[float]:
    """The loss of each step."""
    module = FineTuning(model)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet
    )
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    torch.manual_seed(0)
    print(train(Model(), batches(4)))

"""accelerate: a patched Hugging Face model, micro-batches and ranks, divided by all documents."""

import contextlib

import torch
from accelerate import Accelerator
from pytorch_loop import batches
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bft import HeadLoss, patch_model


def small_model(vocab_size: int = 512) -> PreTrainedModel:
    """A random Llama, always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_attention_heads=4, **sizes))


def rows(count: int) -> list[dict[str, Tensor]]:
    """Documents ``[T]``, and their labels."""
    return [{name: value[0] for name, value in batch.items()} for batch in batches(count, rows=1)]


def train(
    model: PreTrainedModel,
    data: list[dict[str, Tensor]],
    loss: HeadLoss,
    batch_size: int = 4,
    accumulation: int = 2,
) -> list[float]:
    """The balanced loss of each step. Run it with ``torchrun`` for several ranks."""
    accelerator = Accelerator()  # its gradient_accumulation_steps stays 1: num_items divides
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = torch.utils.data.DataLoader(data, batch_size)
    model, optimizer, loader = accelerator.prepare(patch_model(model, loss), optimizer, loader)
    losses, step = [], []
    for batch in loader:
        step.append(batch)
        if len(step) < accumulation:
            continue
        counts = [loss.count_items(batch["labels"][:, 1:]) for batch in step]
        items = accelerator.reduce(torch.stack(counts).sum())
        parts = []
        for batch in step:
            last = batch is step[-1]
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                part = model(**batch, num_items=items).loss
                accelerator.backward(part * accelerator.num_processes)  # DDP averages over ranks
            parts.append(part.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(torch.stack(parts).sum()).item())
        step = []
    return losses


if __name__ == "__main__":
    print(train(small_model(), rows(32), HeadLoss(window=4)))

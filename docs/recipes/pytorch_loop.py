"""Plain PyTorch: a step's micro-batches are divided by the labelled tokens of all of them."""

import torch
from torch import Tensor, nn

from bft_kernels import linear_cross_entropy


class Model(nn.Module):
    """A language model that returns hidden states; the loss reads ``head.weight``."""

    def __init__(self, vocab_size: int = 512, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids))[0]  # [B, T, D]


def batches(count: int, rows: int = 4, length: int = 16) -> list[dict[str, Tensor]]:
    """Random ids and labels, ``[B, T]``: prompts of all lengths are ignored, or the whole row."""
    ids = torch.randint(512, (count, rows, length), generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(count * rows).view(count, rows, 1) % (length + 1)
    labels = ids.masked_fill(torch.arange(length) < prompts, -100)
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def train(model: Model, data: list[dict[str, Tensor]], accumulation: int = 2) -> list[float]:
    """The loss of each step, in nats per labelled token."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for start in range(0, len(data), accumulation):
        step = data[start : start + accumulation]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        loss = 0.0
        for batch in step:
            hidden, weight = model(batch["input_ids"]), model.head.weight
            part = linear_cross_entropy(
                hidden, weight, batch["labels"], shift=True, num_items=items
            )
            part.backward()
            loss += part.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    print(train(Model(), batches(8)))

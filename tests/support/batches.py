"""Batches and records for models of tests.support.models, and the loss that is a model's own."""

import torch

from bft.loss import IGNORE, HeadLoss

SFT = HeadLoss(scheme="sft", normalize="token")


def rows(count=2, length=12, ignored=0):
    """``input_ids`` and ``labels [count, length]``, the first of each row without a label."""
    ids = torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :ignored] = IGNORE
    return {"input_ids": ids, "labels": labels}


def chat(*contents, **extra):
    """A record of messages, by the user and the assistant in turn."""
    roles = ["user", "assistant"]
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)],
        **extra,
    }

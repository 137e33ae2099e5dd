"""Batches, records, losses and gradients for models of tests.support.models."""

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


def gradients_of(model, *losses):
    """The gradients of some losses, or those that are there."""
    if losses:
        model.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients(got, want, relative=1e-6):
    """Two models' gradients differ by rounding; float32 where a body rounds to it."""
    assert got.keys() == want.keys()
    # Some gradients are zero but for rounding (a bias of keys): those need another measure.
    small = 1e-3 * max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        error = float((got[name] - value).norm() / value.norm().clamp_min(small))
        assert error < relative, f"{name}: relative error {error:.1e}"

"""The specification's sample of a problem, and which of its draws rounding may decide."""

import torch

from bft_kernels import reference


def specified_sample(p, seed, eps, **transform):
    """The sample of the labelled rows, in float64."""
    own, rows = p.of_labelled(), p.positions.tolist()
    return reference.sampled_gradient(
        *own.args, seed, eps=eps, bias=own.bias, rows=rows, **transform
    )


def distance(p, seed, eps, **transform):
    """How far each draw of the labelled rows is from its threshold, as a part of it ``[n, V]``."""
    own, columns = p.of_labelled(), torch.arange(len(p.weight))
    logits = reference.logits(own.hidden, own.weight, own.bias, **transform)
    threshold = logits.softmax(1) / eps
    return (reference.uniforms(seed, p.positions.tolist(), columns) / threshold - 1).abs()


def undecided(p, seed, eps, **transform):
    """The draws that the rounding of a logit to float32 may decide ``[n, V]``."""
    own = p.of_labelled()
    largest = reference.logits(own.hidden, own.weight, own.bias, **transform).abs().max()
    rounding = (float(largest) + 1) * p.hidden.shape[1] * torch.finfo(torch.float32).eps
    return distance(p, seed, eps, **transform) < rounding


def clear_seed(p, seed, eps, **transform):
    """The first seed from ``seed`` on none of whose draws rounding a logit to float32 decides."""
    while bool((distance(p, seed, eps, **transform) < 1e-5).any()):
        seed += 1
    return seed


def sampled_options(p, seed=7, eps=2**-5):
    """Options of a sample of a problem in which every engine that computes in float32 keeps the
    same entries.
    """
    return {"gradient": "sampled", "eps": eps, "seed": clear_seed(p, seed, eps)}

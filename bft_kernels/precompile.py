"""Compiles, before the first step of a loss, what that step would compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bft_kernels.dispatch import select
from bft_kernels.problem import Traits, default_buffer_bytes, make_problem
from bft_kernels.results import Documents, Saved
from bft_kernels.settings import LOCAL_SCHEMES, Settings


def warm_up(
    hidden_size: int,
    vocab_size: int,
    *,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: str | torch.device = "cuda",
    bias: bool = False,
    train_head: bool = True,
    balanced: bool = False,
    **options: Any,
) -> None:
    """Compiles the kernels of a training step, several at once with Triton 3.5 or later; runs none.

    With a backend that compiles nothing it returns at once. Call it before other threads use a GPU,
    and under autocast if the step runs under autocast: products then have the autocast type.

    Args:
        hidden_size, vocab_size: ``D`` and ``V``.
        tokens: tokens of a micro-batch, ignored ones included.
        dtype: type of ``hidden``.
        weight_dtype: type of ``weight`` and the bias; ``dtype`` if None.
        device: the device of the step.
        bias, train_head: whether there is a bias, and whether ``weight`` and bias are trained.
        balanced: whether the loss is :func:`balanced_linear_cross_entropy`, with boundaries on the
            CPU or on the device; otherwise it is :func:`linear_cross_entropy`.
        options: the loss's other options, by name. Give ``reduction="none"`` for ``linear_nll``.

    Raises:
        TypeError: an option is unknown or of another type.
        ValueError: an option is out of its domain.
        RuntimeError: no backend can run.
    """
    settings, device = Settings(**options), torch.device(device)
    if settings.max_buffer_bytes is None:
        settings = replace(settings, max_buffer_bytes=default_buffer_bytes(device))
    stored = weight_dtype or dtype

    def empty(*shape: int, dtype: torch.dtype = stored, grad: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    hidden = empty(tokens, hidden_size, dtype=dtype, grad=True)
    weight = empty(vocab_size, hidden_size, grad=train_head)
    target = empty(tokens, dtype=torch.int64)
    offset = empty(vocab_size, grad=train_head) if bias else None
    problem = make_problem(hidden, weight, target, offset, None, settings)
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        problem = replace(problem, operand=torch.get_autocast_dtype(device.type))
    traits = Traits(device, dtype), Traits(device, stored)
    engine: Any = select(settings.backend, *traits, problem.operand)
    if not hasattr(engine, "compiling"):
        return
    in_forward = settings.gradient == "exact" and train_head and settings.reduction != "none"
    local, named = not balanced or settings.scheme in LOCAL_SCHEMES, not callable(settings.scheme)
    bounds, scale = empty(2, dtype=torch.int64), empty(tokens, dtype=torch.float32)
    with torch.no_grad(), engine.compiling(device):
        if in_forward and named:
            documents = None if local else Documents(bounds, [0, tokens])
            made = engine.weighted_loss(problem, scale, documents)
            for gradient in (made.grad_hidden, made.grad_weight, made.grad_bias):
                engine.scale_(gradient, made.loss)
        if not (in_forward and local):  # also for boundaries on the device
            out = engine.linear_nll(problem)
            by_torch = settings.gradient == "exact" and settings.differentiable
            if problem.saved != "unit" and not by_torch:
                saved = Saved(*(getattr(out, name) for name in Saved._fields))
                for grad_weight in (None, empty(vocab_size, hidden_size)):  # written, or added to
                    engine.linear_nll_backward(problem, scale, saved, grad_weight)
        if balanced and named and (settings.return_stats or not local):
            for items in (None, *(empty(dtype=of) for of in (torch.float32, torch.int64))):
                engine.balanced_loss(scale, target != 0, bounds, items, settings)

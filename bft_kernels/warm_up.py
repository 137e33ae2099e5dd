"""What compiles at the first step of a loss is compiled before it."""

from __future__ import annotations

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
    """Compiles the kernels of a training step, some at a time where Triton can; runs none of them.

    A backend without anything to compile returns at once. Call it before other threads use a GPU.

    Args:
        hidden_size, vocab_size: ``D`` and ``V``.
        tokens: tokens of a micro-batch, ignored ones included.
        dtype: of ``hidden`` and of the products, as autocast makes them.
        weight_dtype: of ``weight`` and the bias; ``dtype`` if None.
        device: where the step will run.
        bias, train_head: whether there is a bias, and whether ``weight`` and bias are trained.
        balanced: for :func:`balanced_linear_cross_entropy`, else :func:`linear_cross_entropy`.
        options: the loss's other options, by name.

    Raises:
        TypeError, ValueError, RuntimeError: as the loss does.
    """
    settings, device = Settings(**options), torch.device(device)
    if settings.max_buffer_bytes is None:
        settings = Settings(**options | {"max_buffer_bytes": default_buffer_bytes(device)})
    stored = weight_dtype or dtype

    def empty(*shape: int, dtype: torch.dtype = stored, grad: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    hidden = empty(tokens, hidden_size, dtype=dtype, grad=True)
    weight = empty(vocab_size, hidden_size, grad=train_head)
    target = empty(tokens, dtype=torch.int64)
    offset = empty(vocab_size, grad=train_head) if bias else None
    problem = make_problem(hidden, weight, target, offset, None, settings)
    engine: Any = select(settings.backend, Traits(device, dtype), Traits(device, stored), dtype)
    if not hasattr(engine, "compiling"):
        return
    bounds = empty(2, dtype=torch.int64)
    documents = None
    if balanced and settings.scheme not in LOCAL_SCHEMES:
        documents = Documents(bounds, [0, tokens])
    scale = empty(tokens, dtype=torch.float32)
    with torch.no_grad(), engine.compiling(device):
        if settings.gradient == "exact" and train_head and settings.reduction != "none":
            made = engine.weighted_loss(problem, scale, documents)
            for gradient in (made.grad_hidden, made.grad_weight, made.grad_bias):
                engine.scale_(gradient, made.loss)
            return
        out = engine.linear_nll(problem)
        if documents:
            for items in (None, empty(dtype=torch.float32)):
                engine.balanced_loss(out.loss, target != 0, bounds, items, settings)
        if problem.saved != "unit":
            saved = Saved(*(getattr(out, name) for name in Saved._fields))
            for grad_weight in (None, empty(vocab_size, hidden_size)):  # written, or added to
                engine.linear_nll_backward(problem, scale, saved, grad_weight)

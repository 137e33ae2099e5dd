"""A training step that goes past a patched model raises.

A trainer may take the labels out of a batch, put a ``forward`` of its own in place of the patched
one, or run a model's body and head itself. Training then goes on with another loss than the one
that was asked for, and no number shows it. So while a model trains (``training``, gradients
enabled), its body and its head raise when they run outside of the patched forward.

``no_grad``, ``eval()`` and ``generate()`` are left alone, and so is a backward pass: activation
checkpointing runs parts of the model again there. Who calls ``model.model.forward`` instead of
``model.model``, or runs the layers one by one, is not seen.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

WAYS_OUT = (
    "unpatch_model(model) leaves the loss to the caller; fused_loss(model, batch, loss)[0], "
    "returned from a trainer's compute_loss, is one loss of a model without a patch; "
    "patch_model(..., allow_unlabelled=True) allows calls without the fused loss"
)


class Bypassed(RuntimeError):
    """A patched model is trained, but not with the loss that it was patched with."""


class Patch(Protocol):
    """What the guard asks of the state of a patched model."""

    depth: int  # patched calls that are running
    allow_unlabelled: bool
    guards: Sequence[RemovableHandle]  # of the head that is guarded, and of the body
    guarded: nn.Module | None

    @property
    def function(self) -> Any:
        """The ``__func__`` of the patched forward."""


class Guard:
    """A forward pre-hook of a model's body or head. An object, so that it is copied and pickled."""

    def __init__(self, model: nn.Module | None, patch: Patch, part: str) -> None:
        self.model, self.patch, self.part = model, patch, part

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        if id(self.model) not in memo:  # the copy of a part alone is no patched model's
            return Guard(None, self.patch, self.part)
        return Guard(memo[id(self.model)], copy.deepcopy(self.patch, memo), self.part)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.model is None or self.patch.depth or self.patch.allow_unlabelled:
            return
        if not trains(module):
            return
        name = type(self.model).__name__
        raise Bypassed(
            f"model: the {self.part} of the patched {name} was run in training outside of its "
            f"patched forward, so the fused loss is not what trains it"
            f"{_replacement(self.model, self.patch)}. {WAYS_OUT}"
        )


def trains(module: nn.Module) -> bool:
    """Whether a call of the module, now, is a training step's forward."""
    return module.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def check_labelled(model: nn.Module, patch: Patch) -> None:
    """Raises Bypassed if a call without labels, now, would train a model past its patch."""
    if not patch.allow_unlabelled and trains(model):
        raise Bypassed(
            f"labels: got none in a training call of the patched {type(model).__name__}, expected "
            "labels or shift_labels (label_smoothing_factor and compute_loss_func of a Trainer "
            f"take them out of the batch). {WAYS_OUT}"
        )


def watch(model: Any, patch: Patch, head: nn.Module) -> None:
    """Hooks that raise where the model's body or its ``head`` trains outside of the patch.

    Older ones are removed.
    """
    unwatch(patch)
    body = getattr(model, "base_model", model)
    if body is model and hasattr(model, "get_decoder"):
        body = model.get_decoder()
    parts = [("head", head)]
    if isinstance(body, nn.Module) and body is not model:
        parts.append(("body", body))
    patch.guards = [m.register_forward_pre_hook(Guard(model, patch, part)) for part, m in parts]
    patch.guarded = head


def unwatch(patch: Patch) -> None:
    """Undoes :func:`watch`."""
    for handle in patch.guards:
        handle.remove()


def _replacement(model: nn.Module, patch: Patch) -> str:
    """Which function stands where the patched forward was, if one does."""
    now = model.__dict__.get("forward")
    if getattr(now, "__func__", None) is patch.function:
        return ""
    return f": {describe(now)} took its place after patch_model"


def describe(forward: Any) -> str:
    """A function's module and name, also where ``functools.wraps`` gave it another's."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__name__
    return f"{function.__globals__.get('__name__', '?')}.{code.co_qualname}"

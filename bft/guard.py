"""A training step that goes past a patched model raises.

A trainer may take the labels out of a batch, replace the patched ``forward``, or run a model's body
and head itself. It would then train with another loss, and no number would show it. So the body and
the head of a model that trains (``training``, gradients enabled) raise outside of the patched
forward.

``no_grad``, ``eval()`` and ``generate()`` are left alone, and so is a backward pass: activation
checkpointing runs parts of the model again there. Not seen is a body whose first layer does not
run as a module, or runs without gradients, beside a product with the head's weight.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from bft.patch import State

WAYS_OUT = (
    "unpatch_model(model) leaves the loss to the caller; fused_loss(model, batch, loss)[0], "
    "returned from a trainer's compute_loss, is one loss of a model without a patch; "
    "patch_model(..., allow_unlabelled=True) allows calls without the fused loss"
)


class Bypassed(RuntimeError):
    """A patched model is trained, but not with the loss that it was patched with."""


class Guard:
    """A forward pre-hook of a model's body or head. An object, so that it is copied and pickled."""

    def __init__(self, model: nn.Module | None, state: "State", part: str) -> None:
        self.model, self.state, self.part = model, state, part

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        if id(self.model) not in memo:  # the copy of a part alone is no patched model's
            return Guard(None, self.state, self.part)
        return Guard(memo[id(self.model)], copy.deepcopy(self.state, memo), self.part)

    def __call__(self, module: nn.Module, args: Any) -> None:
        state = self.state
        if self.model is None or state.depth or state.allow_unlabelled or not trains(module):
            return
        now = self.model.__dict__.get("forward")
        patched = getattr(now, "__func__", None) is state.function
        raise Bypassed(
            f"model: the {self.part} of the patched {type(self.model).__name__} was run in "
            "training outside of its patched forward, so the fused loss is not what trains it"
            f"{'' if patched else f': {describe(now)} took its place after patch_model'}. "
            f"{WAYS_OUT}"
        )


def trains(module: nn.Module) -> bool:
    """Whether a call of the module, now, is a training step's forward."""
    return module.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def check_labelled(model: nn.Module, state: "State") -> None:
    """Raises Bypassed if a call without labels, now, would train a model past its patch."""
    if not state.allow_unlabelled and trains(model):
        raise Bypassed(
            f"labels: got none in a training call of the patched {type(model).__name__}, expected "
            "labels or shift_labels (label_smoothing_factor and compute_loss_func of a Trainer "
            f"take them out of the batch). {WAYS_OUT}"
        )


def watch(model: Any, state: "State", head: nn.Module) -> None:
    """Puts guards on the model's body and its ``head``, in place of older ones."""
    unwatch(state)
    bodies = [getattr(model, "base_model", model)]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else bodies[0]
    if isinstance(decoder, nn.Module):  # its first layer runs in a call of its forward, too
        stacks = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m))
        bodies += [decoder, *next(stacks, [])[:1]]
    parts = {head: "head"} | {body: "body" for body in bodies if body is not model}
    state.guards = [
        module.register_forward_pre_hook(Guard(model, state, part))
        for module, part in parts.items()
    ]
    state.guarded = head


def unwatch(state: "State") -> None:
    """Undoes :func:`watch`."""
    for handle in state.guards:
        handle.remove()


def describe(forward: Any) -> str:
    """A function's module and name, also where ``functools.wraps`` gave it another's."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__name__
    return f"{function.__globals__.get('__name__', '?')}.{code.co_qualname}"

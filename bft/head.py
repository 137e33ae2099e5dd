"""What the fused head needs to know of a Hugging Face causal LM: where its head is, and its logits.

The logits are ``softcap(hidden @ weight.T + bias) / temperature``. Neither half is taken on trust:
:func:`verify_linear` compares the head with its own forward, and :class:`StandIn` sends known
numbers through whatever the model does after its head, from which :func:`read_transform` tells
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_EXPRESSIBLE = "The fused head can only express softcap(hidden @ weight.T + bias) / temperature."


class UnsupportedModel(ValueError):
    """The model's head, or what it does to its logits, cannot be expressed by the fused op."""


class LogitTransform(NamedTuple):
    """From the head's output to the model's logits: ``softcap(y) / temperature``."""

    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        capped = y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)
        return capped / self.temperature


# --- finding the head ----------------------------------------------------------------------------


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside PEFT, DDP, FSDP, DeepSpeed and ``torch.compile`` wrappers."""
    # Wrappers first: most of them forward unknown attributes to what they wrap.
    for name in ("_orig_mod", "module", "_fsdp_wrapped_module"):
        if name in model._modules:
            return causal_lm(model.get_submodule(name))
    if hasattr(model, "get_base_model"):
        return causal_lm(cast(Any, model).get_base_model())
    if not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModel(
            f"model: got {type(model).__name__}, expected a Hugging Face causal LM: it has no "
            "get_output_embeddings()"
        )
    return model


def find_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The module that the model calls for its logits, and the linear layer in it: mostly the same.

    PEFT's ``modules_to_save`` wraps the head and calls a trained copy of it.

    Raises:
        UnsupportedModel: there is none, or it is more than a linear layer.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model: {name} is an encoder-decoder, expected a causal LM")
    outer = model.get_output_embeddings()
    if not isinstance(outer, nn.Module) or isinstance(outer, nn.Embedding):
        raise UnsupportedModel(
            f"model: {name} has no output embedding of its own, a module that it calls on hidden "
            f"states: got {type(outer).__name__}"
        )
    head: Any = outer
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        adapters = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[adapters[0]] if adapters else head.original_module
    if hasattr(head, "base_layer"):
        raise UnsupportedModel(
            f"model: the head of {name} carries an adapter ({type(head).__name__}). Leave it "
            "out of target_modules; to train it, put it in modules_to_save."
        )
    return outer, head


def is_sharded(head: nn.Module) -> bool:
    """Whether the weight is only to be had inside the head's hooks (DTensor of FSDP2, ZeRO-3)."""
    weight = getattr(head, "weight", None)
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


def check_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``weight [V, D]`` and ``bias [V]`` of a linear layer, gathered if it is sharded.

    Raises:
        UnsupportedModel: they are not plain floating-point tensors.
    """
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    kind = type(head).__name__
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(f"head: {kind} has no weight tensor. {_EXPRESSIBLE}")
    for name, value, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if value is None:
            continue
        # By exact type: quantised parameters are subclasses, some of a floating-point dtype.
        if value.dtype not in _DTYPES or type(value) not in (Tensor, nn.Parameter):
            raise UnsupportedModel(
                f"head: the {name} of {kind} is a {type(value).__name__} of {value.dtype}, "
                "expected a plain float tensor: quantised or tensor-parallel heads are not "
                "supported. Keep the head out of quantisation and of the tensor-parallel plan."
            )
        if value.dim() != dims:
            raise UnsupportedModel(f"head: the {name} of {kind} has shape {tuple(value.shape)}")
    return weight, bias


@torch.no_grad()
def verify_linear(
    own: Callable[..., Any],
    rows: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,
) -> None:
    """Raises UnsupportedModel unless ``own`` is ``hidden @ weight.T + bias`` on these rows."""
    expected, got = own(rows), nn.functional.linear(rows, weight, bias)
    # Two ways to the same product may round differently: in a narrow type by a unit in the last
    # place of the largest logit; in a wide one, where the order of the sum shows, half the digits
    # are left.
    eps = torch.finfo(got.dtype).eps
    allowed = (eps if eps > 1e-4 else eps**0.5) * expected.abs().amax()
    if expected.shape != got.shape or bool(((expected - got).abs() > allowed).any()):
        raise UnsupportedModel(
            f"head: its own forward differs from hidden @ weight.T + bias. {_EXPRESSIBLE}"
        )


# --- measuring what the model does to its logits -------------------------------------------------


class StandIn(nn.Module):
    """Takes the head's place in the model's own forward and keeps the hidden states it is given.

    Its answer stands for logits: none at all (no positions), or numbers that tell what the model
    does to them. Those are float64 whatever the model computes in, so that a scale is read off to
    full precision.
    """

    def __init__(self, outer: nn.Module, head: Any, measure: bool) -> None:
        super().__init__()
        self.__dict__["head"] = outer  # not as a submodule
        # ZeRO-3 leaves an empty weight outside of the head's hooks.
        self.vocabulary: int = getattr(head, "out_features", None) or head.weight.shape[0]
        self.measure = measure
        self.received: list[Tensor] = []
        self.answer = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["head"], name)  # models ask for lm_head.weight.dtype

    def forward(self, hidden: Tensor) -> Tensor:
        self.received.append(hidden)
        device = hidden.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        if self.measure:
            self.answer = probe(self.vocabulary, device, wide)
            return self.answer.clone()  # some models write into their logits
        return torch.empty(1, 0, self.vocabulary, device=device, dtype=hidden.dtype)

    def hidden_for(self, target: Tensor) -> Tensor:
        """The hidden states ``[B, T, D]`` of ``target [B, T]``; raises if there are none."""
        if len(self.received) != 1:
            raise UnsupportedModel(
                f"model: its forward called its head {len(self.received)} times, expected once"
            )
        hidden = self.received[0]
        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"labels: got shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])}, "
                "the positions that reach the head (logits_to_keep does not go with labels)"
            )
        return hidden


@contextmanager
def in_place_of(model: nn.Module, head: nn.Module, stand_in: nn.Module) -> Iterator[None]:
    """Within it every submodule of ``model`` that is ``head`` is ``stand_in`` instead."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is head
    ]
    try:
        for parent, name in places:
            parent._modules[name] = stand_in
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = head


# Where a softcap is still a straight line in float64, and no less than float16 has; and where it is
# flat, and no more than float16 has.
_TINY, _HUGE = 2.0**-24, 2.0**14


def probe(vocabulary: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, 5, V]``: zeros, tiny, huge, minus huge, and sizes from 1e-3 to 1e3 of both signs."""
    rows = torch.zeros(5, vocabulary, dtype=dtype, device=device)
    for row, value in enumerate((0.0, _TINY, _HUGE, -_HUGE)):
        rows[row] = value
    sign = 1 - 2 * (torch.arange(vocabulary, device=device) % 2)
    rows[4] = sign * torch.logspace(-3, 3, vocabulary, dtype=dtype, device=device)
    return rows[None]


@torch.no_grad()
def read_transform(sent: Tensor, logits: Any, name: str) -> LogitTransform:
    """The transform that made ``logits`` of what the stand-in sent, :func:`probe`.

    Any chain of softcaps' and scales' forms comes out: ``cap * tanh(s * y / cap)`` is a softcap of
    ``cap / s`` with temperature ``1 / s``.

    Raises:
        UnsupportedModel: the logits are not one such function of each entry, the same everywhere;
            the message says what was seen.
    """
    if not isinstance(logits, Tensor) or logits.shape != sent.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        _refuse(name, f"turns logits {tuple(sent.shape)} into {got}")
    zero, tiny, huge = logits[0, :3].double()
    offset = int((zero != 0).sum())
    if offset:
        _refuse(name, f"masks or adds to {offset} of {zero.numel()} entries of its logits")
    scale, limit = float(tiny[0]) / _TINY, float(huge[0])
    if not scale > 0:
        _refuse(name, f"multiplies its logits by {scale}")
    # A model that casts its logits to float32 gives the scale to that precision only.
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    softcap = limit / scale if limit < 0.5 * scale * _HUGE else None
    transform = LogitTransform(softcap, 1.0 / scale)

    expected = transform(sent.double())
    error = (logits.double() - expected).abs() / expected.abs().clamp_min(1e-30)
    different = int((error > 16 * max(torch.finfo(logits.dtype).eps, 2**-52)).any(1).sum())
    if different:
        _refuse(name, f"changes {different} of {zero.numel()} logits other than by {transform}")
    return transform


def _refuse(name: str, what: str) -> None:
    raise UnsupportedModel(f"model: {name} {what}. {_EXPRESSIBLE}")

"""Where the head of a Hugging Face causal LM is, and whether the fused op can stand for it.

The logits are ``softcap(hidden @ weight.T + bias) / temperature``. Neither half is taken on trust:
:func:`verify_linear` compares the head with its own forward, and :mod:`bft.measure` finds out what
the model does after its head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXPRESSIBLE = "The fused head can only express softcap(hidden @ weight.T + bias) / temperature."


class UnsupportedModel(ValueError):
    """The model's head, or what it does to its logits, cannot be expressed by the fused op."""


class LogitTransform(NamedTuple):
    """From the head's output to the model's logits: ``softcap(y) / temperature``."""

    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        capped = y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)
        return capped / self.temperature


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
    """The module that the model calls for its logits, and the linear layer in it.

    They differ where PEFT wraps the head: ``modules_to_save`` calls a trained copy of it, and an
    adapter adds to what it returns (:mod:`bft.adapter`).

    Raises:
        UnsupportedModel: there is none, or it is more than a linear layer and a low-rank adapter.
    """
    name, outer = type(model).__name__, model.get_output_embeddings()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model: {name} is an encoder-decoder, expected a causal LM")
    if not isinstance(outer, nn.Module) or isinstance(outer, nn.Embedding):
        raise UnsupportedModel(
            f"model: {name} has no output embedding of its own, a module that it calls on hidden "
            f"states: got {type(outer).__name__}"
        )
    head = called_layer(outer)
    if hasattr(head, "base_layer"):
        from bft.adapter import check_adapter  # and peft, which made the wrapper

        check_adapter(head, name)
        head = head.base_layer
    return outer, head


def called_layer(outer: Any) -> Any:
    """The layer that a head calls now: it, or what PEFT's wrapper of it calls in its place.

    That is a trained copy (``modules_to_save``), or a layer that replaces rows of the weight
    (``trainable_token_indices``).
    """
    if hasattr(outer, "modules_to_save") and hasattr(outer, "original_module"):
        adapters = [] if outer.disable_adapters else outer.active_adapters
        return outer.modules_to_save[adapters[0]] if adapters else outer.original_module
    return getattr(outer, "token_adapter", outer)


def vocabulary_of(head: Any) -> int:
    """``V`` of a linear layer."""
    # By the weight first: PEFT calls a copy of a tied head a layer from V to D. ZeRO-3 and FSDP1
    # leave an empty or flat weight outside of the head's hooks.
    shape: Any = getattr(getattr(head, "weight", None), "shape", ())
    return int(shape[0] if len(shape) == 2 and shape[0] else head.out_features)


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
        raise UnsupportedModel(
            f"head: {kind} has no weight tensor (GPTQ and AWQ pack theirs). {EXPRESSIBLE} Keep the "
            "head out of quantisation."
        )
    for name, value, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if value is None:
            continue
        # By exact type: quantised parameters are subclasses, some of a floating-point dtype.
        # An export passes stand-ins of its own for them.
        plain = torch.compiler.is_exporting() or type(value) in (Tensor, nn.Parameter)
        if value.dtype not in _DTYPES or not plain:
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
    # Two ways to one product may round differently: in a narrow type by a unit in the last place of
    # the largest logit. In a wide one the order of the sum shows, and half the digits are left.
    eps = torch.finfo(got.dtype).eps
    allowed = (eps if eps > 1e-4 else eps**0.5) * expected.abs().amax()
    if expected.shape != got.shape or bool(((expected - got).abs() > allowed).any()):
        differs = "its own forward differs from hidden @ weight.T + bias"
        raise UnsupportedModel(f"head: {differs}. {EXPRESSIBLE}")


@contextmanager
def in_place_of(model: nn.Module, head: nn.Module, stand_in: nn.Module) -> Iterator[None]:
    """Within it every submodule of ``model`` that is ``head`` is ``stand_in`` instead."""
    children = [module._modules for module in model.modules()]
    places = [(of, name) for of in children for name, child in of.items() if child is head]
    try:
        for of, name in places:
            of[name] = stand_in
        yield
    finally:
        for of, name in places:
            of[name] = head

"""PEFT's adapters on a model's head, as two thin matrices whose product is added to its logits."""

from typing import Any

import torch
from torch import Tensor, nn

from bft.head import UnsupportedModel, called_layer, check_weight, is_sharded


def check_adapter(outer: Any, name: str) -> None:
    """Raises UnsupportedModel unless the adapters on the head of ``name`` are of low rank.

    These are LoRA's (with any scaling, and dropout on their own path) and single trained tokens.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    # FSDP2 puts a class of its own in front.
    kind = next((k for k in type(outer).__mro__ if k.__module__.startswith("peft.")), type(outer))
    why = ""
    variants = getattr(outer, "lora_variant", {})
    if kind is not Linear and kind is not TrainableTokensLayer:
        if not is_sharded(outer.base_layer):
            check_weight(outer.base_layer)  # PEFT has kinds of its own for quantised layers
        why = f"{kind.__module__}.{kind.__name__} is no product of two thin matrices"
    elif hasattr(outer.base_layer, "base_layer"):
        why = f"{type(outer.base_layer).__name__} lies below {kind.__name__}"
    elif found := sorted({type(v).__name__ for k, v in variants.items() if k in outer.lora_A}):
        why = f"{', '.join(found)} is more than a product (DoRA scales rows of the merged weight)"
    elif any(getattr(outer, "lora_bias", {}).values()):
        why = "lora_bias trains a bias, too"
    elif kind is TrainableTokensLayer and outer.base_layer.bias is not None:
        why = "PEFT's trained tokens leave out the bias of the head"
    if why:
        raise UnsupportedModel(
            f"model: the head of {name} carries an adapter that the fused op cannot express: "
            f"{why}. Give the head plain LoRA, leave it out of target_modules, or train all of it "
            "in modules_to_save"
        )


def low_rank(
    outer: Any,
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D], of the layer below
) -> tuple[Tensor, Tensor] | None:
    """``(a [..., r], b [V, r])``: the active adapters add ``a @ b.T`` to the head's product.

    ``None`` without any: PEFT's way of switching adapters off, or of merging them, is followed.
    """
    outer = called_layer(outer)
    if not hasattr(outer, "base_layer"):
        return None
    if outer.disable_adapters:
        if outer.merged:
            outer.unmerge()
        return None
    if outer.merged:
        return None
    if hasattr(outer, "lora_A"):
        pairs = [_lora(outer, x, hidden) for x in outer.active_adapters if x in outer.lora_A]
    else:
        pairs = [_tokens(outer, x, hidden, weight) for x in outer.active_adapters]
    if not pairs:
        return None
    a, b = zip(*pairs, strict=True)
    return (a[0], b[0]) if len(pairs) == 1 else (torch.cat(a, dim=-1), torch.cat(b, dim=-1))


def _lora(outer: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    down, up = outer.lora_A[name], outer.lora_B[name]
    thin = down(outer.lora_dropout[name](hidden.to(down.weight.dtype)))
    return thin * outer.scaling[name], up.weight


def _tokens(outer: Any, name: str, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``weight`` that are replaced: their difference, at one column each."""
    index = torch.tensor(outer.token_indices[name], dtype=torch.int64, device=weight.device)
    difference = outer.trainable_tokens_delta[name].to(weight) - weight[index]
    b = nn.functional.one_hot(index, len(weight)).T.to(weight)
    return hidden @ difference.T.to(hidden.dtype), b

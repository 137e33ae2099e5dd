"""TRL's fused head with ``linear_nll``: bfloat16 operands, float32 logits, nothing of ``[N, V]``.

TRL's trainers give their models, policy and reference, a forward that returns log-probabilities,
entropies and so on where it is called with ``fused_lm_head=True``. They do so with a function
``add_fused_lm_head`` of their module. `fused_by_bft` puts ours in its place while a trainer is
built: see ``trl_grpo.py`` and ``trl_dpo.py``. Any TRL trainer that calls it can be built so.
"""

import functools
import types
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from bft import fused_loss
from bft_kernels import linear_nll


def fused_by_bft(module: str, **options: Any) -> AbstractContextManager[Any]:
    """Within it the trainer of TRL's ``module`` gives models our head; ``linear_nll``'s options."""
    fused = functools.partial(add_fused_lm_head, **options)
    return mock.patch(f"trl.trainer.{module}.add_fused_lm_head", fused)


def token_scores(
    hidden: Tensor,  # [B, T, D]
    head: Any,
    target: Tensor,  # [B, T]
    cu_seqlens: Tensor | None = None,
    num_items: Any = None,
    *,
    temperature: float = 1.0,
    mean_logits: bool = False,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Each token's loss, its statistics, and perhaps the mean of its logits before a softcap."""
    scale = head.temperature * temperature
    how = {"softcap": head.softcap, "temperature": scale, "return_stats": True, **options}
    how |= {"bias": head.bias, "adapter": head.adapter}  # LoRA's, of the head itself
    nll, stats = linear_nll(hidden, head.weight, target, **how)
    mean = None
    if mean_logits:
        with torch.no_grad():
            mean = hidden.float() @ head.weight.mean(0, dtype=torch.float32)
            if head.adapter is not None:
                a, b = head.adapter
                mean = mean + a.float() @ b.mean(0, dtype=torch.float32)
            mean = (mean if head.bias is None else mean + head.bias.float().mean()) / scale
            mean = mean.masked_fill(target == -100, 0.0)[:, :-1]
    return nll, (stats, mean)


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = (),
    **options: Any,
) -> None:
    """TRL's function of this name, with options of ``linear_nll``."""
    if "log_sum_sq_probs" in outputs:
        raise ValueError("outputs: got log_sum_sq_probs (WPO's weights), which TRL's own head has")
    how = {"temperature": temperature, "mean_logits": "mean_logits" in outputs, **options}
    scores, own = functools.partial(token_scores, **how), model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **call: Any) -> Any:
        if not fused_lm_head:
            return own(*args, **call)
        routed = getattr(self.config.get_text_config(), "output_router_logits", False)
        if call.get("output_router_logits", routed):
            raise ValueError("output_router_logits: got True, expected a model without a router")
        nll, (stats, mean) = fused_loss(self, call, scores)
        return FusedCausalLMOutput(
            log_probs=-nll[:, :-1],
            entropy=stats.entropy[:, :-1],
            mean_logits=mean,
            is_top1=stats.correct[:, :-1],
            label_mask=call["labels"][:, 1:] != -100,
        )

    model.forward = types.MethodType(forward, model)

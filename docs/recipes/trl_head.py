"""TRL's fused head with ``linear_nll``: bfloat16 operands, float32 logits, nothing of ``[N, V]``.

TRL's trainers give their models, policy and reference, a forward that returns log-probabilities,
entropies and so on where it is called with ``fused_lm_head=True``. They do so with a function
``add_fused_lm_head`` of their module. `fused_by_bft` puts ours in its place while a trainer is
built: see ``trl_grpo.py`` and ``trl_dpo.py``. Any TRL trainer that calls it can be built so.
"""

import functools
import types
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from bft import fused_loss
from bft_kernels import linear_nll


def fused_by_bft(module: str) -> AbstractContextManager[Any]:
    """Within it the trainer of TRL's ``module`` gives models our head."""
    return mock.patch(f"trl.trainer.{module}.add_fused_lm_head", add_fused_lm_head)


def token_scores(
    hidden: Tensor,  # [B, T, D]
    head: Any,
    target: Tensor,  # [B, T]
    cu_seqlens: Tensor | None = None,
    num_items: Any = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Any]:
    """Each token's loss, its statistics, and the mean of its logits without a softcap."""
    scale = head.temperature * temperature
    nll, stats = linear_nll(
        hidden,
        head.weight,
        target,
        bias=head.bias,
        softcap=head.softcap,
        temperature=scale,
        return_stats=True,
    )
    with torch.no_grad():
        mean = hidden.float() @ head.weight.float().mean(0) / scale
        if head.bias is not None:
            mean += head.bias.float().mean() / scale
    return nll, (stats, mean)


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: Any = ()
) -> None:
    """TRL's function of this name."""
    if "log_sum_sq_probs" in outputs:
        raise ValueError("outputs: got log_sum_sq_probs (WPO's weights), which TRL's own head has")
    scores = functools.partial(token_scores, temperature=temperature)
    own = type(model).forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **call: Any) -> Any:
        if not fused_lm_head:
            return own(self, *args, **call)
        routed = getattr(self.config.get_text_config(), "output_router_logits", False)
        if call.get("output_router_logits", routed):
            raise ValueError("output_router_logits: got True, expected a model without a router")
        nll, (stats, mean) = fused_loss(self, call, scores)
        ignored = torch.nn.functional.pad(call["labels"][:, 1:], (0, 1), value=-100) == -100
        tokens = (-nll, stats.entropy, mean.masked_fill(ignored, 0.0), stats.correct, ~ignored)
        names = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
        found = {name: value[:, :-1] for name, value in zip(names, tokens, strict=True)}
        return FusedCausalLMOutput(**found)

    model.forward = types.MethodType(forward, model)

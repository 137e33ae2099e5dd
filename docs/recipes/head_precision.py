"""How far log-probabilities are from those of exact logits: bfloat16, float32 head, ours."""

import sys

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft_kernels import linear_nll


def errors(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, tuple[float, float]]:
    """Mean and maximum of ``|log p - exact|``, all ``[N, D]`` and ``[V, D]`` in bfloat16."""

    def log_probs(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]

    ways = {
        "bfloat16 logits": log_probs(linear(hidden, weight).float()),
        "float32 head": log_probs(linear(hidden.float(), weight.float())),
        "linear_nll": -linear_nll(hidden, weight, target),
    }
    exact = log_probs(linear(hidden.double(), weight.double()))
    differences = {way: (found - exact).abs() for way, found in ways.items()}
    return {way: (d.mean().item(), d.max().item()) for way, d in differences.items()}


@torch.no_grad()
def of_model(name: str, text: str) -> dict[str, tuple[float, float]]:
    """The errors of a model in bfloat16, for the tokens of a text."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return errors(hidden[0, :-1], model.get_output_embeddings().weight, ids[0, 1:])


if __name__ == "__main__":
    for way, (mean, largest) in of_model(sys.argv[1], sys.stdin.read()).items():
        print(f"{way:16} mean {mean:.1e}  max {largest:.1e}")

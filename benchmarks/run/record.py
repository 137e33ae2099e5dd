"""``python -m benchmarks record``: saves hidden states, head and targets of a model on a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_LONGEST = 256  # targets of one document; the rest of the document is left out


@dataclass(frozen=True)
class Config:
    """Runs a causal language model over documents and saves the inputs of its loss.

    ``python -m benchmarks loss --inputs`` takes the file.
    """

    texts: Path
    """A text file of documents, with blank lines between them."""
    output: Path
    model: str = "smollm2-135m"
    """A name that `bft train --model` takes, or a folder."""
    tokens: int = 2048


def main(config: Config) -> None:
    """Records the inputs; SystemExit if the text is too short."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bft.load import pretrained

    folder = pretrained(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hidden: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad():
        for document in documents(config.texts):
            ids = tokenizer(document, return_tensors="pt").input_ids[:, : _LONGEST + 1]
            hidden.append(model.get_decoder()(input_ids=ids).last_hidden_state[0, :-1])
            targets.append(ids[0, 1:])
            if sum(map(len, targets)) >= config.tokens:
                break
    found = sum(map(len, targets))
    if found < config.tokens:
        raise SystemExit(f"texts: got {found} tokens in {config.texts}, expected {config.tokens}")
    weight = model.get_output_embeddings().weight.detach()
    states, target = (torch.cat(parts)[: config.tokens].clone() for parts in (hidden, targets))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save((states, weight.clone(), target), config.output)
    nll = torch.nn.functional.cross_entropy(states[:256] @ weight.T, target[:256])
    print(f"{config.output}: N {config.tokens}, D {weight.shape[1]}, V {weight.shape[0]}")
    print(f"nll of the first tokens: {nll:.2f}")


def documents(texts: Path) -> Iterator[str]:
    """The paragraphs of a text file, each on one line."""
    paragraphs = texts.read_text(encoding="utf-8").split("\n\n")
    yield from filter(None, (" ".join(one.split()) for one in paragraphs))

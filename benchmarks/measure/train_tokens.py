"""Rows of tokens for steps of fine-tuning, from documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bft.config import TrainConfig
from bft.encode import encode
from bft.load import pretrained
from bft.records import read_jsonl
from bft.tasks import hpo


def documents(settings: TrainConfig, texts: Path | None) -> Iterator[list[int]]:
    """Token ids, one document after the other: lines of a text file, or the demo's records."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(pretrained(settings.model)))
    if texts is None:
        folder = settings.train_file.parent
        hpo.build(folder)
        for record in read_jsonl(settings.train_file):
            yield encode(record, tokenizer).input_ids
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with texts.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield [*tokenizer(line.strip()).input_ids, *end]


def token_rows(documents: Iterable[list[int]], length: int, count: int) -> Tensor:
    """``[count, length]`` token ids: documents joined and cut, from the start again at their end.

    Raises:
        SystemExit: they do not fill one row.
    """
    tokens = itertools.chain.from_iterable(documents)
    found = list(itertools.islice(tokens, count * length))
    full = len(found) // length
    if full == 0:
        raise SystemExit(f"texts: got {len(found)} tokens, expected at least length, {length}")
    return torch.tensor(found[: full * length]).view(full, length)[torch.arange(count) % full]

"""What a model makes of each held-out record: rows that are paired between runs."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from bft.encode import Record
from bft.evaluate import NothingLeft, evaluate
from bft.load import load_pretrained

METRICS = ("accuracy", "nll", "confidence", "token_accuracy")  # the first that is there is drawn


def evaluate_items(
    model: str,
    records: Sequence[Record],
    *,
    train: Sequence[Record],
    max_length: int | None = None,
    desc: str = "evaluate",
) -> list[dict[str, Any]]:
    """A row for each record that keeps a label.

    A row holds ``id`` (the record's own, or its place in the file), ``tokens``, the number of
    labels, and means over them: ``nll`` in nats, ``confidence``, ``token_accuracy``. A record with
    an ``answer`` has ``accuracy``, 0.0 or 1.0, and ``majority``, whether the commonest answer of
    ``train`` is its own. Numbers that are not finite are as they are.

    Args:
        model: a built-in name, a checkpoint folder or a hub id.
        records: the held-out ones.
        train: whose answers are possible, beside those of ``records``.
        max_length: records are cut to this many tokens.
        desc: what the progress bar says.

    Raises:
        PretrainedError, SettingError: the model cannot be had.
        DataError: as :func:`bft.evaluate.evaluate`.
    """
    loaded, tokenizer = load_pretrained(model, "auto")
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    answered = [record for record in (*train, *records) if "answer" in record.extra]
    commonest = _commonest([record for record in train if "answer" in record.extra])
    rows = []
    for place, record in enumerate(tqdm(records, desc=desc, unit="record")):
        try:
            found = evaluate(
                loaded, tokenizer, [record], train=answered, max_length=max_length, progress=False
            )
        except NothingLeft:
            continue
        row = {"id": str(record.extra.get("id", place)), "tokens": found.tokens, "nll": found.nll}
        row |= {"confidence": found.confidence, "token_accuracy": found.token_accuracy}
        if found.accuracy is not None:
            row["accuracy"] = found.accuracy
            row["majority"] = float(record.extra["answer"] == commonest)
        rows.append(row)
    del loaded
    free()
    return rows


def _commonest(answered: Sequence[Record]) -> str | None:
    """The most frequent answer; of several the first in the alphabet."""
    counts = Counter(record.extra["answer"] for record in answered)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=None)


def mean_nll(rows: Sequence[dict[str, Any]]) -> float:
    """Over labels, in nats."""
    return sum(row["nll"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


def free() -> None:
    """Gives back the memory of the models that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

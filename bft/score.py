"""``bft score``: what a model makes of each labelled token, for a filter or a teacher's cache.

A line of JSONL a record, in the order of the file, or one safetensors file: there the tokens of all
records follow each other, and those of record ``i`` are ``offsets[i]:offsets[i + 1]``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bft.config import ScoreConfig
from bft.data import Collator
from bft.encode import DataError, Example, encode
from bft.evaluate import batches
from bft.isolation import evaluation_mode
from bft.limits import check_fits
from bft.load import load_pretrained
from bft.loss import IGNORE, Head, aligned
from bft.metrics import naming, to_json
from bft.patch import use_loss
from bft.records import read_jsonl
from bft_kernels import linear_nll

# Of a record with ``n`` labelled tokens: positions, ids, log_probs, entropy [n], and with top_k
# top_ids and top_log_probs [n, k]. Positions are places among the record's tokens.
Scores = dict[str, Tensor]


def score(config: ScoreConfig) -> None:
    """Scores the records of a file, and writes ``config.output``.

    Raises:
        DataError, PretrainedError: the records or the model cannot be read, or do not fit.
    """
    records = read_jsonl(config.file, limit=config.limit)
    model, tokenizer = load_pretrained(config.model, "auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = [encode(record, tokenizer) for record in records]
    if config.max_length is not None:
        examples = [example.cut(config.max_length) for example in examples]
    check_fits(examples, model, tokenizer)
    found = token_scores(model, Collator.of(tokenizer), examples, top_k=config.top_k)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with naming(config.output):
        write_scores(config.output, examples, found)


def token_scores(
    model: Any,
    collate: Collator,
    examples: Sequence[Example],
    *,
    top_k: int = 0,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> list[Scores]:
    """The scores of each example's labelled tokens, on the CPU, in batches of like length."""
    scores = _Scores(top_k)
    labelled = [place for place, example in enumerate(examples) if example.labelled]
    if not labelled:
        raise DataError(f"no record of {len(examples)} keeps a label")
    found: list[Scores] = [{} for _ in examples]
    device = next(model.parameters()).device
    bar = tqdm(total=len(labelled), desc="score", unit="record", disable=None if progress else True)
    with bar, evaluation_mode(model), use_loss(model, scores), torch.no_grad():
        for places in batches(labelled, lambda i: len(examples[i].input_ids), batch_tokens):
            batch = collate([examples[place] for place in places])
            model(**aligned(send_to_device(batch, device)))
            for row, place in enumerate(places):
                found[place] = scores.of_row(row)
            bar.update(len(places))
    nothing = {name: values[:0] for name, values in found[labelled[0]].items()}
    return [one or nothing for one in found]


class _Scores:
    """Stands in for the loss of a fused head: there hidden states and the head's weight meet."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.batch: Scores = {}  # of the last call, [B, T] or [B, T, k] each

    def __call__(
        self,
        hidden: Tensor,  # [B, T, D]
        head: Head,
        target: Tensor,  # [B, T], aligned with hidden
        *_: Any,
    ) -> tuple[Tensor, None]:
        nll, stats = linear_nll(
            hidden,
            target=target,
            ignore_index=IGNORE,
            return_stats=True,
            top_k=self.top_k,
            **vars(head),
        )
        made = {"ids": target, "log_probs": -nll, "entropy": stats.entropy}
        if self.top_k:
            made |= {"top_ids": stats.top_ids, "top_log_probs": stats.top_log_probs}
        self.batch = {name: values.cpu() for name, values in made.items()}
        return nll.sum(), None

    def of_row(self, row: int) -> Scores:
        """The labelled tokens of a row of the last batch."""
        at = (self.batch["ids"][row] != IGNORE).nonzero().squeeze(1)
        return {"positions": at + 1} | {name: x[row][at] for name, x in self.batch.items()}


def write_scores(path: Path, examples: Sequence[Example], found: Sequence[Scores]) -> None:
    """Writes what :func:`token_scores` found, as the suffix of ``path`` says."""
    if path.suffix == ".safetensors":
        lengths = [0, *(len(one["ids"]) for one in found)]
        offsets = torch.tensor(lengths, dtype=torch.int64, device="cpu").cumsum(0)
        together = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        save_file({"offsets": offsets, **together}, path)
        return
    with path.open("w", encoding="utf-8") as file:
        for example, one in zip(examples, found, strict=True):
            row = {"where": example.where, **{name: x.tolist() for name, x in one.items()}}
            file.write(to_json(row) + "\n")

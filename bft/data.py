"""Makes data sets of the records that :mod:`bft.encode` encodes, and batches of those."""

import itertools
import logging
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from bft.encode import DataError, Example, Record, encode
from bft.loss import IGNORE
from bft_kernels.values import check_int

logger = logging.getLogger(__name__)

# The window `auto`, as a share of the median answer. A guess: no measurement has chosen it yet.
AUTO_WINDOW = 1 / 8


class AnswerDataset:
    """Encoded records, cut to `max_length` tokens; those left without a label are dropped.

    `truncated` and `dropped` (of which `answers_lost` to the cut) are counts. Raises DataError if a
    record cannot be encoded or none keeps a label.
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: Any,
        *,
        max_length: int | None = None,
        progress: bool = False,
    ) -> None:
        if max_length is not None:
            check_int("max_length", max_length, 2)
        self.examples: list[Example] = []
        self.truncated = self.dropped = self.answers_lost = 0
        for record in tqdm(
            records, desc="tokenise", unit="record", disable=None if progress else True
        ):
            whole = encode(record, tokenizer)
            example = whole if max_length is None else whole.cut(max_length)
            if example.labelled:
                self.examples.append(example)
                self.truncated += len(example.input_ids) < len(whole.input_ids)
            else:
                self.dropped += 1
                self.answers_lost += whole.labelled > 0
        if not self.examples:
            raise DataError(
                f"no record keeps a label ({self.dropped} dropped, {self.answers_lost} of them "
                f"because max_length={max_length} cuts the whole answer)"
            )
        if self.answers_lost:
            logger.warning(
                "max_length=%s cuts away the whole answer of %d records; they are dropped",
                max_length,
                self.answers_lost,
            )
        if self.truncated:
            logger.warning("max_length=%s shortens %d records", max_length, self.truncated)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def auto_window(self) -> int:
        """The window ``auto``: a share of the median number of labels of an example, 1 or more."""
        median = statistics.median(example.labelled for example in self.examples)
        return max(1, math.floor(AUTO_WINDOW * median + 0.5))


class StepBatches:
    """The micro-batches of one rank, for the optimizer steps `first` to `steps` of a run.

    The run reads one endless stream: a permutation of the records for each epoch. Step s takes its
    own `batch_size * accumulation * ranks` records of it, whatever was read before, so that a
    resumed run goes on where it stopped. The same documents make a step however they are cut in
    micro-batches and ranks; with `lengths`, those of like length share a micro-batch.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        check_int("size", size, 1)
        check_int("batch_size", batch_size, 1)
        check_int("accumulation", accumulation, 1)
        check_int("ranks", ranks, 1)
        check_int("rank", rank, 0, ranks - 1)
        self.size, self.batch_size, self.accumulation = size, batch_size, accumulation
        self.rank, self.ranks, self.seed, self.lengths = rank, ranks, seed, lengths
        self.step_size = batch_size * accumulation * ranks  # records
        self.first, self.steps = 0, self.steps_in(1)

    def steps_in(self, epochs: float) -> int:
        """The smallest number of steps that reads `epochs` times as many records as there are."""
        return max(1, math.ceil(epochs * self.size / self.step_size - 1e-9))

    def start(self, first: int, steps: int) -> None:
        """The next iteration yields the micro-batches of the steps `first`, ..., `steps` - 1."""
        self.first, self.steps = first, steps

    def __len__(self) -> int:
        return max(0, self.steps - self.first) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream(self.first * self.step_size)
        for _ in range(self.first, self.steps):
            records = list(itertools.islice(stream, self.step_size))
            if self.lengths is not None:
                records.sort(key=self.lengths.__getitem__, reverse=True)
            for part in range(self.accumulation):
                start = (part * self.ranks + self.rank) * self.batch_size
                yield records[start : start + self.batch_size]

    def _stream(self, place: int) -> Iterator[int]:
        while True:
            epoch, skipped = divmod(place, self.size)
            yield from shuffled(self.size, self.seed, epoch)[skipped:]
            place += self.size - skipped


def shuffled(size: int, seed: int, epoch: int = 0) -> list[int]:
    """A permutation of `range(size)` that depends on nothing but its arguments."""
    order = list(range(size))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class Collator:
    """Right-padded batches: `input_ids`, `attention_mask`, `labels`, each [B, T] int64.

    With them comes `token_weight` [B, T] float32, if an example of the batch has weights.
    """

    pad_token_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The tokenizer's pad token, or its end token: the mask hides either."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None))

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        ids = [_row(example.input_ids) for example in examples]
        labels = [_row(example.labels) for example in examples]
        batch = {
            "input_ids": pad_sequence(ids, True, self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            "labels": pad_sequence(labels, True, IGNORE),
        }
        if weights := _weights(examples):
            batch["token_weight"] = pad_sequence(weights, True)
        return batch


def collate_packed(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """All examples in one row [1, T]: `position_ids` restart, and no first token is a label.

    `token_weight` is there as in :class:`Collator`.
    There is no attention mask: transformers sees the restarts and keeps documents apart.
    """
    ids = [i for example in examples for i in example.input_ids]
    labels = [label for example in examples for label in [IGNORE, *example.labels[1:]]]
    positions = [t for example in examples for t in range(len(example.input_ids))]
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
    batch = {name: _row(row)[None] for name, row in rows.items()}
    if weights := _weights(examples):
        batch["token_weight"] = torch.cat(weights)[None]
    return batch


def _weights(examples: Sequence[Example]) -> list[torch.Tensor]:
    """The weights of each example; none at all if no example has any."""
    if all(example.weights is None for example in examples):
        return []
    rows = [example.weights or [1.0] * len(example.labels) for example in examples]
    return [_row(row, torch.float32) for row in rows]


def _row(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")

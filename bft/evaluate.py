"""Held-out evaluation: loss and confidence of the answers' tokens, and whether the answer is right.

"Right" is constrained exact match. A record may carry an `answer`, with which its completion
starts. Greedy search along the answers of the task (a trie of tokens) must arrive at the record's
own. It does if and only if the gold token has the largest logit among its siblings wherever the
trie branches on the gold path. Those logits come from one teacher-forced pass, without a tensor of
[B, T, V]: from a few gathered rows of the head.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from bft.data import Collator
from bft.encode import DataError, Example, Record, encode, prompt_text
from bft.isolation import evaluation_mode
from bft.limits import check_fits
from bft.loss import IGNORE, Head, aligned
from bft.patch import use_loss
from bft_kernels import linear_nll

Item = TypeVar("Item")


class NothingLeft(DataError):
    """No record keeps a label, or its whole `answer`, after `max_length`."""


@dataclass(frozen=True)
class Evaluation:
    """Means over labelled tokens, in nats. Fields about answers are None where there are none."""

    examples: int
    dropped: int  # nothing (or not the whole `answer`) left after `max_length`
    tokens: int
    nll: float
    perplexity: float
    confidence: float  # mean probability of the label
    token_accuracy: float  # label = most probable token of the whole vocabulary
    accuracy: float | None  # constrained exact match
    majority_accuracy: float | None  # of always giving the training set's most frequent answer
    majority_answer: str | None
    per_answer: dict[str, dict[str, int]]  # {answer: {"examples": ..., "correct": ...}}
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Branch:
    """A node of the gold path with several children."""

    position: int  # the hidden state there predicts the next token
    children: tuple[int, ...]  # token ids, ascending
    gold: int  # index into children


@dataclass(frozen=True)
class _Item:
    example: Example
    answer: str | None
    branches: tuple[Branch, ...]


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    train: Sequence[Record] | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Evaluation:
    """Evaluates `model` on `records`, in batches of about `batch_tokens` tokens.

    The possible answers are those of `records` and of `train`; the majority baseline predicts the
    most frequent one of `train`, or of `records` where that is None.

    Raises:
        NothingLeft: no record keeps a label.
        DataError: an `answer` does not start its completion, in text or in tokens; it starts
            another answer; or the model cannot take a record.
    """
    started = time.perf_counter()
    known = _answers(records if train is None else train)
    choices = sorted({*known, *_answers(records)})
    bar = tqdm(
        records, desc="tokenise", unit="record", disable=None if progress else True, leave=False
    )
    found = [_item(record, tokenizer, choices, max_length) for record in bar]
    items = [item for item in found if item is not None]
    if not items:
        raise NothingLeft(f"no record of {len(records)} keeps a label (max_length={max_length})")
    check_fits([item.example for item in items], model, tokenizer)
    total, hits = _score(model, Collator.of(tokenizer), items, batch_tokens, progress)
    nll = total["nll"] / total["tokens"]
    seen = Counter(item.answer for item in items if item.answer is not None)
    # Ties go to the first in the alphabet, so that the baseline does not depend on file order.
    majority = min(known, key=lambda a: (-known[a], a)) if known and seen else None
    return Evaluation(
        examples=len(items),
        dropped=len(records) - len(items),
        tokens=int(total["tokens"]),
        nll=nll,
        perplexity=math.inf if nll >= 700 else math.exp(nll),
        confidence=total["confidence"] / total["tokens"],
        token_accuracy=total["correct"] / total["tokens"],
        accuracy=sum(hits[a] for a in seen) / seen.total() if seen else None,
        majority_accuracy=seen[majority] / seen.total() if majority else None,
        majority_answer=majority,
        per_answer={a: {"examples": seen[a], "correct": hits[a]} for a in sorted(seen)},
        seconds=time.perf_counter() - started,
    )


def _answers(records: Iterable[Record]) -> Counter[str]:
    return Counter(r.extra["answer"] for r in records if isinstance(r.extra.get("answer"), str))


def _item(
    record: Record, tokenizer: Any, choices: Sequence[str], max_length: int | None
) -> _Item | None:
    example = encode(record, tokenizer)
    answer = record.extra.get("answer")
    branches: tuple[Branch, ...] = ()
    end = 0
    if answer is not None:
        start = _last_run(example.labels)
        paths = _paths(record, tokenizer, choices)
        gold = _gold(record, answer, example.input_ids[start:], paths)
        branches = tuple(gold_branches(gold, list(paths.values()), start))
        end = start + len(gold)
    if max_length is not None:
        if end > max_length:
            return None
        example = example.cut(max_length)
    return _Item(example, answer, branches) if example.labelled else None


def _last_run(labels: Sequence[int]) -> int:
    """Where the last stretch of labels begins: the last answer."""
    pairs = enumerate(itertools.pairwise([IGNORE, *labels]))
    return max((i for i, (before, label) in pairs if before == IGNORE != label), default=0)


def _paths(record: Record, tokenizer: Any, choices: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of every possible answer as this record's prompt would be continued."""
    prompt = prompt_text(record, tokenizer)
    texts = [prompt, *(prompt + choice for choice in choices)]
    before, *rows = tokenizer(texts, add_special_tokens=False).input_ids
    paths = {}
    for choice, ids in zip(choices, rows, strict=True):
        # A merge across the boundary: the answer stands alone, as in `data.split_tokens`.
        joined = ids[: len(before)] != before
        alone = tokenizer(choice, add_special_tokens=False).input_ids if joined else None
        paths[choice] = list(alone if alone is not None else ids[len(before) :])
    # In order of tokens a prefix always stands before its extension.
    order = sorted(paths.items(), key=lambda item: item[1])
    for (first, a), (second, b) in itertools.pairwise(order):
        if b[: len(a)] == a:
            raise DataError(
                f"{record.where}: 'answer': {first!r} starts {second!r}, so greedy search cannot "
                "tell where to stop; expected answers that end differently, as with a full stop"
            )
    return paths


def _gold(
    record: Record, answer: Any, completion: Sequence[int], paths: Mapping[str, list[int]]
) -> list[int]:
    if not isinstance(answer, str) or not answer:
        raise DataError(f"{record.where}: 'answer': expected a non-empty string, got {answer!r}")
    text = [m["content"] or "" for m in record.messages if m["role"] == "assistant"][-1]
    if not text.startswith(answer):
        raise DataError(
            f"{record.where}: 'answer': expected the start of the completion {text[:60]!r}, "
            f"got {answer!r}"
        )
    gold = paths[answer]
    if list(completion[: len(gold)]) != gold:
        raise DataError(
            f"{record.where}: 'answer': the tokens of {answer!r} are not the first tokens of the "
            "completion; expected an answer that ends where a token ends, as at a full stop"
        )
    return gold


def gold_branches(
    gold: Sequence[int], paths: Sequence[Sequence[int]], start: int
) -> Iterator[Branch]:
    """The branching nodes along `gold`, which begins at position `start` of its row."""
    gold = list(gold)
    alive = [list(path) for path in paths]
    for depth, token in enumerate(gold):
        children = tuple(sorted({path[depth] for path in alive}))
        if len(children) > 1:
            yield Branch(start + depth - 1, children, children.index(token))
        alive = [path for path in alive if path[depth] == token]


def _score(
    model: Any, collate: Collator, items: Sequence[_Item], batch_tokens: int, progress: bool
) -> tuple[Counter[str], Counter[str | None]]:
    """Sums over all labelled tokens, and how often each answer was arrived at."""
    device = next(model.parameters()).device
    measure = _Measure()
    bar = tqdm(total=len(items), desc="evaluate", unit="record", disable=None if progress else True)
    with bar, evaluation_mode(model), use_loss(model, measure), torch.no_grad():
        for measure.items in batches(items, _length, batch_tokens):
            batch = collate([item.example for item in measure.items])
            model(**aligned(send_to_device(batch, device)))
            bar.update(len(measure.items))
            bar.set_postfix(nll=f"{measure.total['nll'] / measure.total['tokens']:.3f}")
    return measure.total, measure.hits


class _Measure:
    """Stands in for the loss of a fused head: there hidden states and the head's weight meet."""

    def __init__(self) -> None:
        self.items: Sequence[_Item] = ()  # of the rows of the next batch
        self.total: Counter[str] = Counter()
        self.hits: Counter[str | None] = Counter()

    def __call__(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        head: Head,
        target: torch.Tensor,  # [B, T], aligned with hidden
        cu_seqlens: torch.Tensor | None = None,
        num_items: int | torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,  # of training; here every label counts once
    ) -> tuple[torch.Tensor, None]:
        labelled = target != IGNORE
        adapter = head.adapter and (head.adapter[0][labelled], head.adapter[1])
        nll, stats = linear_nll(
            hidden[labelled],  # [N, D]
            target=target[labelled],
            return_stats=True,
            **{**vars(head), "adapter": adapter},
        )
        sums: dict[str, Any] = {
            "nll": nll.double().sum().item(),
            "confidence": stats.confidence.double().sum().item(),
            "correct": int(stats.correct.sum().item()),
            "tokens": nll.numel(),
        }
        self.total.update(sums)
        won = right_answers(hidden, head, [item.branches for item in self.items])
        self.hits.update(item.answer for item, ok in zip(self.items, won, strict=True) if ok)
        return nll.sum(), None


def right_answers(hidden: torch.Tensor, head: Head, rows: Sequence[Sequence[Branch]]) -> list[bool]:
    """For each row of hidden [B, T, D], whether the gold child wins at all of its branches."""
    return [
        all(_winner(hidden, head, row, branch) == branch.gold for branch in branches)
        for row, branches in enumerate(rows)
    ]


def _winner(hidden: torch.Tensor, head: Head, row: int, branch: Branch) -> int:
    """Which child has the largest logit; softcap and temperature keep their order."""
    children = torch.tensor(branch.children, dtype=torch.int64, device=hidden.device)
    logits = head.weight[children].float() @ hidden[row, branch.position].float()
    if head.adapter is not None:
        a, b = head.adapter
        logits = logits + b[children].float() @ a[row, branch.position].float()
    if head.bias is not None:
        logits = logits + head.bias[children].float()
    return int(logits.argmax())


def _length(item: _Item) -> int:
    return len(item.example.input_ids)


def batches(
    items: Sequence[Item], length: Callable[[Item], int], batch_tokens: int
) -> Iterator[list[Item]]:
    """Items of like length, the longest first, so that there is little padding."""
    order = sorted(items, key=lambda item: -length(item))
    while order:
        size = max(1, batch_tokens // length(order[0]))
        yield order[:size]
        order = order[size:]

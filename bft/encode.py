"""A record's text -> token ids in which only the answers carry labels.

The tokenizer's own chat template renders the text. Every assistant turn carries labels, its
turn-end token included; `labels[t]` belongs to `input_ids[t]`, and the loss shifts. A tokenizer
without a template gets prompt + completion + end-of-sequence.
"""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jinja2

from bft.loss import IGNORE


class DataError(ValueError):
    """A record that cannot be used: where it stands, what came, and what was expected."""


# The factor of the loss of what it belongs to, or one for each labelled token of that.
Weight = float | list[float]


@dataclass(frozen=True)
class Record:
    """One line of a JSONL file. Its weight multiplies those that assistant turns have."""

    messages: tuple[Mapping[str, Any], ...]
    where: str = "record"  # "train.jsonl:17", for error messages
    pair: tuple[str, str] | None = None  # (prompt, completion) where the record came in that form
    extra: Mapping[str, Any] = field(default_factory=dict)  # the keys that are not ours
    tools: tuple[Mapping[str, Any], ...] = ()  # what the chat template is told of functions
    weight: Weight | None = None


@dataclass(frozen=True)
class Example:
    """One tokenised record: `input_ids` and `labels` have one length, -100 where no label is.

    So have `weights`, the factors of the tokens' losses; None: the record names none.
    """

    input_ids: list[int]
    labels: list[int]
    where: str = field(default="record", compare=False)  # its record's, for error messages
    weights: list[float] | None = None

    def cut(self, length: int) -> Self:
        """The first `length` tokens."""
        weights = None if self.weights is None else self.weights[:length]
        ids, labels = self.input_ids[:length], self.labels[:length]
        return replace(self, input_ids=ids, labels=labels, weights=weights)

    @property
    def labelled(self) -> int:
        """Labels that a causal model can be trained on (the first token has nothing before it)."""
        return sum(label != IGNORE for label in self.labels[1:])


def encode(record: Record, tokenizer: Any) -> Example:
    """Renders and tokenises one record, labels and weights on its answers. Raises DataError."""
    example = _encode(record, tokenizer)
    weights = weights_of_labels(record, example.labels)
    return example if weights is None else replace(example, weights=weights)


def _encode(record: Record, tokenizer: Any) -> Example:
    if not tokenizer.chat_template:
        return _encode_plain(record, tokenizer)
    _check_template_writes(record, tokenizer)
    if _marks_answers(_template(record, tokenizer)):
        return _encode_marked(record, tokenizer)
    text, spans = _answer_spans(record, tokenizer)
    cuts = [edge for span in spans for edge in span]
    pieces = split_tokens(tokenizer, text, cuts, record.where)
    ids: list[int] = []
    labels: list[int] = []
    for index, piece in enumerate(pieces):  # prompt, answer, prompt, answer, ..., rest
        kept = _turn_length(piece, tokenizer) if index % 2 else 0
        ids += piece
        labels += piece[:kept] + [IGNORE] * (len(piece) - kept)
    return Example(ids, labels, record.where)


def weights_of_labels(record: Record, labels: Sequence[int]) -> list[float] | None:
    """The factor of each token's loss, 0 where no label is; None if the record names no weight."""
    of_turns = {
        f"messages[{index}].weight": message.get("weight")
        for index, message in enumerate(record.messages)
        if message["role"] == "assistant"
    }
    named = any(weight is not None for weight in of_turns.values())
    if record.weight is None and not named:
        return None
    groups = itertools.groupby(label != IGNORE for label in labels)
    answers = [sum(group) for labelled, group in groups if labelled]
    if not named:  # a template may mark something else than one answer a turn
        of_turns, answers = {"weight": None}, [sum(answers)]
    if len(answers) != len(of_turns):
        raise DataError(
            f"{record.where}: 'weight': the chat template makes {len(answers)} labelled stretches "
            f"of {len(of_turns)} 'assistant' turns, so a turn's own weight has no place; expected "
            "one stretch a turn, or one weight of the whole record"
        )
    parts = zip(of_turns.items(), answers, strict=True)
    factors = map(
        operator.mul,
        _spread(record.weight, sum(answers), f"{record.where}: 'weight'"),
        itertools.chain(*(_spread(w, n, f"{record.where}: '{name}'") for (name, w), n in parts)),
    )
    return [0.0 if label == IGNORE else next(factors) for label in labels]


def _spread(weight: Weight | None, count: int, what: str) -> list[float]:
    """A factor for each of ``count`` labelled tokens."""
    if not isinstance(weight, list):
        return [1.0 if weight is None else float(weight)] * count
    if len(weight) != count:
        raise DataError(
            f"{what}: got {len(weight)} numbers, expected one, or {count}: as many as there are "
            "labelled tokens, the answer's end among them"
        )
    return list(map(float, weight))


def prompt_text(record: Record, tokenizer: Any) -> str:
    """The text that a model sees before it writes the record's last answer."""
    if not tokenizer.chat_template:
        return _pair(record)[0]
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    return _render(record, tokenizer, last, prompt=True)


def split_tokens(tokenizer: Any, text: str, cuts: Sequence[int], where: str) -> list[list[int]]:
    """Tokenises `text` and cuts the ids at the character offsets `cuts`: len(cuts) + 1 lists.

    A tokenizer may merge characters across a cut. Then the pieces are tokenised one by one, as a
    model meets them when it continues a prompt.

    Raises:
        DataError: such pieces do not decode to the same text.
    """
    whole = _ids(tokenizer, text)
    starts = [_ids(tokenizer, text[:cut]) for cut in cuts]
    if all(whole[: len(start)] == start for start in starts):
        edges = [0, *map(len, starts), len(whole)]
        return [whole[a:b] for a, b in itertools.pairwise(edges)]
    offsets = [0, *cuts, len(text)]
    pieces = [_ids(tokenizer, text[a:b]) for a, b in itertools.pairwise(offsets)]
    if tokenizer.decode([i for piece in pieces for i in piece]) != tokenizer.decode(whole):
        raise DataError(
            f"{where}: the tokenizer joins the end of a prompt and the start of its answer into "
            "one token; expected an answer that starts with the space that separates them"
        )
    return pieces


def _encode_plain(record: Record, tokenizer: Any) -> Example:
    prompt, completion = _pair(record)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{record.where}: expected a tokenizer with an end-of-sequence token")
    before, answer = split_tokens(tokenizer, prompt + completion, [len(prompt)], record.where)
    if tokenizer.bos_token_id in tokenizer("a").input_ids[:1]:  # a chat template writes its own
        before = [tokenizer.bos_token_id, *before]
    answer = [*answer, tokenizer.eos_token_id]
    return Example(before + answer, [IGNORE] * len(before) + answer, record.where)


def _encode_marked(record: Record, tokenizer: Any) -> Example:
    """Labels what the template puts into {% generation %} blocks."""
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _apply_template(record, tokenizer, **options)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    special = set(tokenizer.all_special_ids)
    for i in range(1, len(ids)):  # some templates put the turn's end outside of the mark
        if mask[i - 1] and not mask[i] and ids[i] in special and ids[i - 1] not in special:
            mask[i] = 1
    if not any(mask):
        raise DataError(
            f"{record.where}: the chat template has a {{% generation %}} block and puts nothing of "
            "this record into it; expected it around what an 'assistant' turn says"
        )
    labels = [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]
    return Example(ids, labels, record.where)


def _template(record: Record, tokenizer: Any) -> str:
    """The template's text. A tokenizer may have several, such as one for tools."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template(tools=list(record.tools) or None))
    except ValueError as error:
        raise DataError(f"{record.where}: no chat template for this record: {error}") from error


@functools.lru_cache(maxsize=8)
def _marks_answers(template: str) -> bool:
    """Whether a template has a {% generation %} block; in a comment or a string it is none."""
    try:
        tokens = [t for t in jinja2.Environment().lex(template) if t[1] != "whitespace"]
    except jinja2.TemplateSyntaxError:  # rendering says what is wrong with it
        return False
    return any(
        begin[1] == "block_begin" and name[1:] == ("name", "generation")
        for begin, name in itertools.pairwise(tokens)
    )


def _check_template_writes(record: Record, tokenizer: Any) -> None:
    """Raises DataError if the template leaves out a record's tools or the calls of them."""
    silent = tuple({k: v for k, v in m.items() if k != "tool_calls"} for m in record.messages)
    for key, without in (
        ("tools", replace(record, tools=())),
        ("tool_calls", replace(record, messages=silent)),
    ):
        if without == record:
            continue
        text = _render(record, tokenizer, len(record.messages))
        try:
            left_out = _render(without, tokenizer, len(record.messages)) == text
        except DataError:  # the template needs them
            continue
        if left_out:
            raise DataError(
                f"{record.where}: {key!r}: the tokenizer's chat template leaves them out; expected "
                "a template that writes them, or records without"
            )


def _pair(record: Record) -> tuple[str, str]:
    if record.pair is None:
        raise DataError(
            f"{record.where}: 'messages' needs a tokenizer with a chat template and this one has "
            "none; expected 'prompt' and 'completion', or set tokenizer.chat_template"
        )
    return record.pair


def _answer_spans(record: Record, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat and the character span of each assistant turn in it.

    A span is what one more message adds to the generation prompt. So a template may only append.
    """
    text = _render(record, tokenizer, len(record.messages))
    spans = []
    for index, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before = _render(record, tokenizer, index, prompt=True)
        after = _render(record, tokenizer, index + 1)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{record.where}: 'messages[{index}]': the chat template rewrites earlier turns "
                "or its generation prompt, so the answer cannot be located; expected a template "
                "that only appends, or one that marks answers with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _render(record: Record, tokenizer: Any, stop: int, *, prompt: bool = False) -> str:
    options = {"tokenize": False, "add_generation_prompt": prompt}
    return str(_apply_template(record, tokenizer, stop, **options))


def _apply_template(record: Record, tokenizer: Any, stop: int | None = None, **options: Any) -> Any:
    if record.tools:
        options["tools"] = list(record.tools)
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in record.messages[:stop]]
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise whatever they like about roles and their order
        roles = [message["role"] for message in record.messages]
        refused = f"the chat template refused the roles {roles}: {error}"
        raise DataError(f"{record.where}: {refused}") from error


def _turn_length(piece: list[int], tokenizer: Any) -> int:
    """Length of an answer with its turn-end token, without a line break that follows."""
    special = set(tokenizer.all_special_ids)
    for length in range(len(piece), 0, -1):
        if piece[length - 1] in special:
            tail = tokenizer.decode(piece[length:])
            return length if not tail.strip() else len(piece)
    return len(piece)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)

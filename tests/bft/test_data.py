"""Only answers carry labels, whatever the template; cuts, batches and their order."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bft.data import AnswerDataset, Collator, StepBatches, collate_packed, shuffled
from bft.encode import DataError, Example, encode, prompt_text
from bft.loss import IGNORE
from bft.records import make_record
from tests.support.batches import chat

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What does the heart do?"},
    {"role": "assistant", "content": "It pumps the blood."},
    {"role": "user", "content": "And the eye?"},
    {"role": "assistant", "content": "It affects the system."},
]

# Real templates in small: another turn end, one that trims, one without any turn-end token.
GEMMA = (
    "{% for m in messages %}<|start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer: {{ m['content'] }}\n\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
REWRITES = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>\n"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def answers(example, tokenizer):
    """The text of each stretch of labels."""
    runs = []
    before = IGNORE
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "<|end|>"), (GEMMA, "<|end|>"), (MARKED, "<|end|>"), (PLAIN, "\n\n")],
    ids=["chatml", "gemma", "marked", "plain"],
)
def test_every_answer_is_labelled_with_its_end_and_nothing_else(tokenizer, template, end):
    tokenizer.chat_template = template or tokenizer.chat_template
    record = make_record({"messages": CHAT})
    example = encode(record, tokenizer)
    if template != PLAIN:  # where a token spans the end of the prompt
        prompt = tokenizer(prompt_text(record, tokenizer), add_special_tokens=False).input_ids
        assert example.input_ids[: len(prompt)] == prompt  # what generation sees
        assert example.labels[len(prompt) - 1] == IGNORE != example.labels[len(prompt)]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    space = " " if template == PLAIN else ""  # after "Answer:", so part of what the model writes
    expected = [space + "It pumps the blood." + end, space + "It affects the system." + end]
    assert answers(example, tokenizer) == expected


def test_prompt_and_completion_are_a_chat_of_two_turns(tokenizer):
    record = make_record({"prompt": "And the eye?", "completion": "It affects it.", "id": 7})
    assert record.extra == {"id": 7}
    turns = make_record(chat("And the eye?", "It affects it."))
    assert encode(record, tokenizer) == encode(turns, tokenizer)


def test_without_a_template_the_pair_is_joined_and_ended(tokenizer):
    tokenizer.chat_template = None
    example = encode(make_record({"prompt": "yes or no?", "completion": " yes"}), tokenizer)
    assert tokenizer.decode(example.input_ids) == "yes or no? yes<|end|>"
    assert answers(example, tokenizer) == [" yes<|end|>"]
    tokenizer.bos_token = "<|start|>"
    tokenizer.add_bos_token = True
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        with_start = encode(make_record({"prompt": "yes", "completion": " no"}), tokenizer)
        assert with_start.input_ids[0] == tokenizer.bos_token_id
        assert with_start.labels[0] == IGNORE
    with pytest.raises(DataError, match="chat template"):
        encode(make_record(chat("a", "b")), tokenizer)


@pytest.mark.parametrize(("prompt", "completion"), [("h", "e"), ("yes\n\n", "no")])
def test_a_token_across_the_boundary_is_cut_there(tokenizer, prompt, completion):
    tokenizer.chat_template = None
    alone = tokenizer(prompt).input_ids
    assert tokenizer(prompt + completion).input_ids[: len(alone)] != alone  # the premise
    example = encode(make_record({"prompt": prompt, "completion": completion}), tokenizer)
    assert example.input_ids[: len(alone)] == alone
    assert answers(example, tokenizer) == [completion + "<|end|>"]


def test_a_boundary_that_the_tokenizer_cannot_keep_is_refused():
    # Like SentencePiece: text that stands alone gets a space in front.
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    vocabulary = {token: i for i, token in enumerate(["</s>", "▁", "a", "b", "▁a", "▁b", "▁ab"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    example = encode(make_record({"prompt": "a", "completion": " b"}), spaced)
    assert answers(example, spaced) == ["b</s>"]
    with pytest.raises(DataError, match="starts with the space"):
        encode(make_record({"prompt": "a", "completion": "b"}), spaced)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (REWRITES, r"'messages\[2\]'.*rewrites earlier turns"),
        ("{{ raise_exception('no system turn') }}", "system.*no system turn"),
        (MARKED + "{{ raise_exception('no system turn') }}", "system.*no system turn"),
        (MARKED.replace("'assistant'", "'model'", 1), "generation.* puts nothing of this record"),
        ({"rag": MARKED, "tool_use": MARKED}, "no chat template for this record"),
    ],
    ids=["rewrites", "refuses a role", "marks, and refuses a role", "marks nothing", "no default"],
)
def test_a_template_that_does_not_take_a_record_is_named(tokenizer, template, says):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"x:3: .*{says}"):
        encode(make_record({"messages": CHAT}, "x:3"), tokenizer)


def test_a_template_that_rewrites_history_takes_one_turn(tokenizer):
    tokenizer.chat_template = REWRITES
    assert answers(encode(make_record(chat("a", "b")), tokenizer), tokenizer) == ["b<|end|>"]


@pytest.mark.parametrize(
    "other",
    [
        lambda own: "{# answers go into {% generation %} #}" + own,
        lambda own: "{# {%- generation -%} {% endgeneration %} #}" + own,
        lambda own: "{% set unused = '{% generation %}' %}" + own,
        lambda own: {"default": own, "tool_use": MARKED},
    ],
    ids=["in a comment", "in a comment, whole", "in a string", "in another template"],
)
def test_a_mark_elsewhere_is_none(tokenizer, other):
    record = make_record({"messages": CHAT})
    expected = encode(record, tokenizer)
    tokenizer.chat_template = other(tokenizer.chat_template)
    assert encode(record, tokenizer) == expected


# --- weights -------------------------------------------------------------------------------------


def weighted(record=None, *turns):
    """The record of CHAT with a weight, and with weights of its answers."""
    rows = [dict(message) for message in CHAT]
    for row, weight in zip(rows[2::2], turns, strict=False):
        row["weight"] = weight
    return make_record({"messages": rows, "weight": record}, "x:3")


# Each answer of CHAT has 6 tokens.
@pytest.mark.parametrize("template", [None, MARKED, "{{ messages | tojson }}" + MARKED])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.3,), [0.3] * 12),
        ((-2, 0), [0] * 6 + [-2] * 6),
        ((None, None, 0.5), [1] * 6 + [0.5] * 6),
        ((None, [*range(6)], -1), [*range(6)] + [-1] * 6),
        (([*range(12)], 2), [0, 2, 4, 6, 8, 10, *range(6, 12)]),
    ],
    ids=["record", "a turn of a weighted record", "a turn", "tokens of a turn", "tokens"],
)
def test_weights_go_to_labels_and_not_to_the_template(tokenizer, template, weights, expected):
    tokenizer.chat_template = template or tokenizer.chat_template
    plain = encode(weighted(), tokenizer)
    assert plain.weights is None
    example = encode(weighted(*weights), tokenizer)
    assert (example.input_ids, example.labels) == (plain.input_ids, plain.labels)
    of_labels = [
        w for w, label in zip(example.weights, example.labels, strict=True) if label != IGNORE
    ]
    assert of_labels == expected
    assert sum(example.weights) == sum(expected)
    assert example.cut(30).weights == example.weights[:30]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (([1.0] * 13,), "'weight': got 13 numbers, expected one, or 12"),
        ((None, []), r"'messages\[2\].weight': got 0 numbers, expected one, or 6"),
    ],
)
def test_a_list_of_weights_that_does_not_fit_is_named(tokenizer, weights, says):
    with pytest.raises(DataError, match=f"^x:3: {says}"):
        encode(weighted(*weights), tokenizer)


def test_a_turn_without_a_stretch_of_its_own_may_have_no_weight(tokenizer):
    tokenizer.chat_template = MARKED.replace("'assistant' %}", "'assistant' and loop.last %}", 1)
    with pytest.raises(
        DataError, match=r"^x:3: 'weight': .* makes 1 labelled stretches of 2 'assist"
    ):
        encode(weighted(None, 1.0), tokenizer)
    assert sum(encode(weighted([2.0] * 6), tokenizer).weights) == 12


# --- tools ---------------------------------------------------------------------------------------

CALLS = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['content'] %}{{ m['content'] }}"
    "{% endif %}{% if 'tool_calls' in m %}{{ m['tool_calls'] | tojson }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "beat", "arguments": {"rate": 60}}}
WITH_CALL = {
    "messages": [
        {"role": "user", "content": "Beat."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "60", "tool_calls": None},
        {"role": "assistant", "content": "It beats."},
    ]
}


def test_a_call_without_content_is_an_answer(tokenizer):
    tokenizer.chat_template = CALLS
    example = encode(make_record(WITH_CALL), tokenizer)
    call, answer = answers(example, tokenizer)
    assert json.loads(call.removesuffix("<|end|>")) == [CALL]
    assert answer == "It beats.<|end|>"
    with_tools = encode(make_record(WITH_CALL | {"tools": [{"name": "beat"}]}), tokenizer)
    assert tokenizer.decode(with_tools.input_ids).startswith('<|start|>tools\n[{"name": "beat"}]')
    assert answers(with_tools, tokenizer) == [call, answer]


def test_a_template_that_leaves_out_tools_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"x:3.*'tools'.*leaves them out"):
        encode(make_record(chat("a", "b", tools=[{"name": "beat"}]), "x:3"), tokenizer)
    with pytest.raises(DataError, match="x:3"):  # this template cannot do without content
        encode(make_record(WITH_CALL, "x:3"), tokenizer)
    tokenizer.chat_template = GEMMA.replace("m['content']", "(m['content'] or '')")
    with pytest.raises(DataError, match=r"x:3.*'tool_calls'.*leaves them out"):
        encode(make_record(WITH_CALL, "x:3"), tokenizer)


TURN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: "<|" not in text and text.strip()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is only read
@given(turns=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3))
def test_any_text_comes_back_whole(tokenizer, turns):
    record = make_record(chat(*(text for turn in turns for text in turn)))
    example = encode(record, tokenizer)
    ids = [tokenizer.convert_ids_to_tokens(i) for i in example.input_ids]
    text = tokenizer.backend_tokenizer.decoder.decode(ids)
    assert text == tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    # Labels: each answer's bytes and one end, however the tokens fall.
    ends = [i for i, label in enumerate(example.labels) if label == tokenizer.eos_token_id]
    assert len(ends) == len(turns)
    for end, (_, answer) in zip(ends, turns, strict=True):
        start = end
        while example.labels[start - 1] != IGNORE:
            start -= 1
        tokens = tokenizer.convert_ids_to_tokens(example.labels[start:end])
        assert tokenizer.backend_tokenizer.decoder.decode(tokens) == answer


# --- the data set --------------------------------------------------------------------------------


def test_cuts_are_counted_and_lost_answers_dropped(tokenizer, caplog):
    records = [make_record(chat("a", "b")), make_record(chat("a", "b" * 50))]
    records.append(make_record(chat("a" * 60, "b")))
    whole = AnswerDataset(records, tokenizer)
    assert (len(whole), whole.truncated, whole.dropped) == (3, 0, 0)
    with caplog.at_level(logging.WARNING):
        cut = AnswerDataset(records, tokenizer, max_length=30)
    assert (len(cut), cut.truncated, cut.dropped, cut.answers_lost) == (2, 1, 1, 1)
    assert len(cut[1].input_ids) == len(cut[1].labels) == 30
    assert "whole answer of 1 records" in caplog.text
    with pytest.raises(DataError, match="no record keeps a label"):
        AnswerDataset(records[2:], tokenizer, max_length=30)
    with pytest.raises(ValueError, match="max_length"):
        AnswerDataset(records, tokenizer, max_length=1)


# --- batches -------------------------------------------------------------------------------------

EXAMPLES = [
    Example([5, 6, 7], [IGNORE, 6, 7]),
    Example([8], [8]),
    Example([9, 10, 11, 12], [IGNORE, IGNORE, IGNORE, 12]),
]


def test_a_label_on_the_first_token_does_not_count():
    assert [example.labelled for example in EXAMPLES] == [2, 0, 1]


def test_padding():
    batch = Collator(99)(EXAMPLES)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    none = IGNORE
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 99], [8, 99, 99, 99], [9, 10, 11, 12]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
        "labels": [[none, 6, 7, none], [8, none, none, none], [none, none, none, 12]],
    }


def test_weights_are_a_column_of_batches_that_have_some():
    batch = [replace(EXAMPLES[0], weights=[0.0, -1.0, 0.5]), *EXAMPLES[1:]]
    for collate in (Collator(99), collate_packed):
        assert "token_weight" not in collate(EXAMPLES)
    padded, packed = (collate(batch)["token_weight"] for collate in (Collator(99), collate_packed))
    assert padded.dtype == packed.dtype == torch.float32
    assert padded.tolist() == [[0, -1, 0.5, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert packed.tolist() == [[0, -1, 0.5, 1, 1, 1, 1, 1]]


def test_the_pad_token_may_be_missing(tokenizer):
    assert Collator.of(tokenizer).pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.pad_token = None
    assert Collator.of(tokenizer).pad_token_id == tokenizer.eos_token_id


def test_packing_restarts_positions_and_starts_no_document_with_a_label():
    batch = collate_packed(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE, IGNORE, IGNORE, 12]]


# --- order ---------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_only_on_every_machine():
    orders = {tuple(shuffled(30, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert shuffled(30, 1, 2) == shuffled(30, 1, 2)
    assert shuffled(8, 0, 0) == [5, 0, 3, 6, 4, 7, 2, 1]


@given(
    size=st.integers(1, 23),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    ranks=st.integers(1, 3),
    steps=st.integers(1, 6),
    first=st.integers(0, 6),
)
def test_steps_take_the_stream_however_it_is_split(
    size, batch_size, accumulation, ranks, steps, first
):
    counts = {"batch_size": batch_size, "accumulation": accumulation, "ranks": ranks}
    per_rank = []
    for rank in range(ranks):
        batches = StepBatches(size, rank=rank, seed=3, **counts)
        batches.start(first, steps)
        per_rank.append(list(batches))
        assert len(batches) == len(per_rank[-1])
    width = batch_size * accumulation * ranks
    epochs = range(steps * width // size + 2)
    wanted = [i for epoch in epochs for i in shuffled(size, 3, epoch)]
    for step in range(first, steps):
        seen = [
            index
            for part in range(accumulation)
            for rank in range(ranks)
            for index in per_rank[rank][(step - first) * accumulation + part]
        ]
        assert seen == wanted[step * width : (step + 1) * width]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (0.1, 1), (0, 1)], ids=str)
def test_steps_in_epochs(epochs, steps):
    assert StepBatches(10, batch_size=2, accumulation=2).steps_in(epochs) == steps


def test_bad_splits_are_refused():
    for name in ("size", "batch_size", "accumulation", "ranks"):
        counts = {"size": 4, "batch_size": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            StepBatches(**counts)
    with pytest.raises(ValueError, match="rank: got 2, expected at most 1"):
        StepBatches(4, batch_size=1, rank=2, ranks=2)

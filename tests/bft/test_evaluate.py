"""Constrained exact match is greedy search along the answers; the loss is the model's own."""

import dataclasses
import json
import math
import operator
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bft import evaluate as module
from bft.encode import DataError, encode, prompt_text
from bft.evaluate import gold_branches, right_answers
from bft.loss import IGNORE, Head
from bft.records import make_record
from tests.support.models import tiny

evaluate = partial(module.evaluate, progress=False)
ANSWERS = [
    "It affects the eye.",
    "It affects the ear.",
    "It affects the nervous system.",
    "It affects metabolism and homeostasis.",
    "The heart.",
    "yes",
]
KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "bias": ("LlamaForCausalLM", {}),
    "softcap": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "scale": ("CohereForCausalLM", {"logit_scale": 0.3}),
}


def tiny_model(tokenizer, kind="llama"):
    """Random, and sharp enough that prompts matter."""
    name, settings = KINDS[kind]
    model = tiny(name, vocab_size=len(tokenizer), hidden_size=32, **settings)
    if kind == "bias":
        model.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    return model.eval()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


def question(prompt, answer, end, where=""):
    row = {"prompt": prompt, "completion": f"{answer}{end}", "answer": answer}
    return make_record(row, where)


def questions(number=60):
    places = [(i, ANSWERS[i % len(ANSWERS)]) for i in range(number)]
    return [
        question(f"What does item {i * 37 % 101} affect?", answer, f" It is number {i}.", f"q:{i}")
        for i, answer in places
    ]


def greedy(model, prompt, paths):
    """The answer that greedy search arrives at, token by token, when it may write no others."""
    written = []
    while list(paths.values()).count(written) == 0:
        children = sorted({path[len(written)] for path in paths.values()})
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written])).logits[0, -1]
        written = [*written, max(children, key=lambda child: float(logits[child]))]
        paths = {a: p for a, p in paths.items() if p[: len(written)] == written}
    return next(answer for answer, path in paths.items() if path == written)


def greedy_along_answers(model, tokenizer, record):
    """The same for a record of `questions`."""
    prompt = tokenizer(prompt_text(record, tokenizer), add_special_tokens=False).input_ids
    paths = {}
    for answer in ANSWERS:
        row = {"prompt": record.messages[0]["content"], "completion": f"{answer} It is"}
        ids = encode(make_record(row), tokenizer).input_ids[len(prompt) :]
        text = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
        paths[answer] = ids[: text.index(answer)]
    return greedy(model, prompt, paths)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_models_own_logits_and_of_greedy_search(tokenizer, kind):
    model, records = tiny_model(tokenizer, kind), questions()
    result = evaluate(model, tokenizer, records)
    right = [greedy_along_answers(model, tokenizer, r) == r.extra["answer"] for r in records]
    assert 0.05 < sum(right) / len(right) < 0.95  # else this shows nothing
    assert result.accuracy == sum(right) / len(right)
    for answer in ANSWERS:
        mine = [ok for ok, r in zip(right, records, strict=True) if r.extra["answer"] == answer]
        assert result.per_answer[answer] == {"examples": len(mine), "correct": sum(mine)}
    nll, correct = [], []
    for example in (encode(record, tokenizer) for record in records):
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels)[1:]
        rows, targets = logits[labels != IGNORE], labels[labels != IGNORE]
        nll.append(torch.nn.functional.cross_entropy(rows, targets, reduction="none"))
        correct.append(rows.argmax(1) == targets)
    each = torch.cat(nll)
    assert (result.examples, result.tokens) == (len(records), each.numel())
    assert result.nll == pytest.approx(each.mean().item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(each.mean().item()), rel=1e-5)
    assert result.confidence == pytest.approx((-each).exp().mean().item(), rel=1e-5)
    assert result.token_accuracy == torch.cat(correct).double().mean().item()
    weighted = [dataclasses.replace(record, weight=-2.0) for record in records]
    one_by_one = evaluate(model, tokenizer, weighted, batch_tokens=1)  # weights are for training
    assert one_by_one.per_answer == result.per_answer
    assert one_by_one.nll == pytest.approx(result.nll, rel=1e-5)
    assert one_by_one.token_accuracy == result.token_accuracy


def test_the_baseline_is_the_training_sets_commonest_answer(model, tokenizer):
    records = questions(8)  # two of the first two answers, one of the others
    train = [r for r in questions(60) if r.extra["answer"] != "yes"]
    train += [r for r in train if r.extra["answer"] == "The heart."]
    result = evaluate(model, tokenizer, records, train=train)
    assert (result.majority_answer, result.majority_accuracy) == ("The heart.", 1 / 8)
    own = evaluate(model, tokenizer, records)
    assert (own.majority_answer, own.majority_accuracy) == (ANSWERS[1], 2 / 8)  # a tie


def test_answers_of_the_training_set_are_possible_too(model, tokenizer):
    one = [r for r in questions(60) if r.extra["answer"] == "The heart."]
    assert evaluate(model, tokenizer, one).accuracy == 1.0  # no other way to go
    result = evaluate(model, tokenizer, one, train=questions())
    expected = [greedy_along_answers(model, tokenizer, record) == "The heart." for record in one]
    assert result.accuracy == sum(expected) / len(expected)


def test_records_without_answers_only_have_a_loss(model, tokenizer):
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    records = [make_record({"messages": chat})]
    result = evaluate(model, tokenizer, records)
    assert result.tokens == 2 * len(tokenizer("assistant<|end|>").input_ids)
    assert (result.accuracy, result.majority_accuracy, result.majority_answer) == (None, None, None)
    assert result.per_answer == {}
    assert json.loads(json.dumps(result.to_dict()))["examples"] == 1


def test_the_answer_is_that_of_the_last_turn(model, tokenizer):
    first = questions(1)[0].messages
    rows = []
    for answer in ANSWERS[:2]:
        turn = {"role": "assistant", "content": answer + " So."}
        rows.append({"messages": [*first, first[0], turn], "answer": answer})
    result = evaluate(model, tokenizer, [make_record(row) for row in rows])
    prompt = tokenizer(prompt_text(make_record(rows[0]), tokenizer)).input_ids
    winner = greedy(model, prompt, {a: tokenizer(a).input_ids for a in ANSWERS[:2]})
    assert result.per_answer[winner]["correct"] == 1
    assert result.accuracy == 0.5


def test_without_a_chat_template(model, tokenizer):
    tokenizer.chat_template = None
    answers = [" yes" if i % 2 else " no" for i in range(20)]
    records = [question(f"item {i}?", answer, ", so") for i, answer in enumerate(answers)]
    result = evaluate(model, tokenizer, records)
    paths = {answer: tokenizer(answer).input_ids for answer in answers}
    prompts = [tokenizer(record.messages[0]["content"]).input_ids for record in records]
    found = [greedy(model, prompt, paths) for prompt in prompts]
    assert result.accuracy == sum(map(operator.eq, found, answers)) / 20


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train().model.layers[0].eval()  # a frozen part
    forward = model.forward
    modes = {name: m.training for name, m in model.named_modules()}
    evaluate(model, tokenizer, questions(3))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert model.forward == forward


def test_long_records_are_cut_as_in_training(model, tokenizer):
    short = questions(1)[0]
    prompt, answer = short.messages[0]["content"], short.extra["answer"]
    long = question(prompt, answer, " It is number 0." + " and" * 200)
    lost = question("so " * 100, answer, "")
    limit = len(encode(short, tokenizer).input_ids)
    evaluated = [short, long, lost]
    result = evaluate(model, tokenizer, evaluated, train=questions(), max_length=limit)
    assert (result.examples, result.dropped) == (2, 1)
    # The long one has a label where the short one has the line break after its end.
    assert result.tokens == 2 * encode(short, tokenizer).labelled + 1
    with pytest.raises(DataError, match="keeps a label"):
        evaluate(model, tokenizer, [lost], max_length=limit)


@pytest.mark.parametrize(
    ("answers", "completion", "says"),
    [
        ([3], "yes", "'answer': expected a non-empty string, got 3"),
        (["no"], "yes", "'answer': expected the start of the completion 'yes', got 'no'"),
        (["the ey"], "the eye.", "are not the first tokens of the completion"),
        (["yes", "yes no"], "yes no", "'yes' starts 'yes no'"),
    ],
)
def test_a_bad_answer_is_named(model, tokenizer, answers, completion, says):
    records = [
        make_record({"prompt": "a", "completion": completion, "answer": answer}, f"x:{i}")
        for i, answer in enumerate(answers)
    ]
    with pytest.raises(DataError) as error:
        evaluate(model, tokenizer, records)
    assert str(error.value).startswith("x:0: ")
    assert says in str(error.value)


@given(
    paths=st.lists(
        st.lists(st.integers(0, 4), min_size=1, max_size=4).map(lambda path: [*path, 5]),
        min_size=1,
        max_size=8,
        unique_by=tuple,
    ),
    seed=st.integers(0, 1000),
)
def test_exactly_the_answer_that_greedy_search_reaches_is_right(paths, seed):
    """The logits here depend on the position alone, so that one pass asks for all paths."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 6, 8, generator=draw).expand(len(paths), -1, -1)
    head = Head(torch.randn(6, 8, generator=draw), torch.randn(6, generator=draw))
    logits = hidden[0] @ head.weight.T + head.bias
    alive, depth = paths, 0
    while len(alive) > 1:
        best = max({path[depth] for path in alive}, key=lambda token: float(logits[depth, token]))
        alive = [path for path in alive if path[depth] == best]
        depth += 1
    rows = [list(gold_branches(path, paths, start=1)) for path in paths]
    right = right_answers(hidden, head, rows)
    assert [path for path, ok in zip(paths, right, strict=True) if ok] == alive

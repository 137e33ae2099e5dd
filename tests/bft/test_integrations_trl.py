"""BFTSFTTrainer beside TRL's SFTTrainer."""

import itertools

import datasets
import numpy as np
import peft
import pytest
import torch
import trl

from bft.integrations.trl import BFTSFTTrainer
from bft.logits import DeferredLogits
from bft.patch import unpatch_model
from tests.support.batches import chat
from tests.support.models import tiny
from tests.support.runs import one_step

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

# As of the tokenizer, with the marks of what the assistant wrote.
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
WORDS = "It pumps the blood. It affects the eye, the ear, metabolism and homeostasis."
ANSWERS = [WORDS[: 8 + 17 * n % 60] for n in range(8)]
TEXT = [{"text": answer} for answer in ANSWERS]
CHAT = [chat("yes or no?", "no.", "what?", answer) for answer in ANSWERS]
PAIRS = [{"prompt": "answer: ", "completion": answer} for answer in ANSWERS]
LORA = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
PROMPT = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
SFT_TRAINER = "BFTSFTTrainer"
KINDS = {
    "text": (TEXT, {}),
    "chat": (CHAT, {}),
    "assistant": (CHAT, {"assistant_only_loss": True}),
    "completion": (PAIRS, {}),
    "whole pairs": (PAIRS, {"completion_only_loss": False}),
    "packed": (PAIRS, {"packing": True, "max_length": 40}),
    "packed chat": (CHAT, {"packing": True, "max_length": 64, "assistant_only_loss": True}),
    "padding free": (PAIRS, {"padding_free": True, "max_length": None}),
    "wrapped": (TEXT, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "lora": (PAIRS, {"peft_config": LORA}),
    "virtual tokens": (PAIRS, {"peft_config": PROMPT}),
}


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer whose step shows in the weights as it is, two micro-batches a step."""
    tokenizer.chat_template = TEMPLATE
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    plain |= {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "logging_steps": 1}
    plain |= {"per_device_train_batch_size": 3, "bf16": False, "gradient_checkpointing": False}
    plain |= {"max_steps": 2, "per_device_eval_batch_size": 2, "max_length": 64}

    def build(kind, data=PAIRS, options=None, model="LlamaForCausalLM", **settings):
        options = dict(options or {})
        if "peft_config" in settings:
            options["peft_config"] = settings.pop("peft_config")
        if isinstance(model, str):
            model = tiny(model, vocab_size=len(tokenizer)).double()
        torch.manual_seed(1)
        torch.nn.init.normal_(model.lm_head.weight)  # confidences of all sizes
        rows = datasets.Dataset.from_list(data)
        args = trl.SFTConfig(**one_step(tmp_path) | plain | settings)
        sets = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        return kind(model, args, **sets, **options)

    return build


def weights(trainer):
    return {k: p.detach().clone() for k, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_logs(ours, own, rel=1e-4):
    for mine, theirs in zip(ours.state.log_history, own.state.log_history, strict=True):
        for name, value in theirs.items():
            if not name.endswith(("runtime", "per_second", "preparation_time")):
                assert mine[name] == pytest.approx(value, rel=rel), name


def assert_same_run(ours, own):
    before = weights(ours)
    for trainer in (ours, own):
        trainer.train()
        trainer.evaluate()
    got, want = weights(ours), weights(own)
    way = max(float((want[name] - before[name]).abs().max()) for name in want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * way)
    assert_same_logs(ours, own)


FAST = [("dft", "assistant"), ("dft", "packed"), ("dft", "lora"), ("sft", "packed chat")]
ALL = [(scheme, kind) for scheme in ("sft", "dft") for kind in KINDS]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST]


@pytest.mark.cell(SFT_TRAINER, "loss", "gradient", "accumulation", "packing", "evaluation")
@pytest.mark.parametrize(("scheme", "kind"), FAST + SLOW)
def test_sft_and_dft_are_those_of_trl(make, scheme, kind):
    data, settings = KINDS[kind]
    options = {"scheme": scheme, "normalize": "token"}
    ours = make(BFTSFTTrainer, data, options, **settings)
    loss_type = {"sft": "nll", "dft": "dft"}[scheme]
    assert_same_run(ours, make(trl.SFTTrainer, data, loss_type=loss_type, **settings))
    logged = ours.state.log_history[0]
    assert logged["confidence"] == pytest.approx(logged["token_weight"]) or scheme == "sft"


WEIGHTS = [0.3, -0.5, 2.0, 0.0, 1.0, 0.7, 1.5, 1.0]
TURNS = [
    {
        "messages": [
            {**m, "weight": w if m["role"] == "assistant" else None} for m in row["messages"]
        ]
    }
    for row, w in zip(CHAT, WEIGHTS, strict=True)
]
WEIGHTED = {
    "completion": ([{**row, "weight": w} for row, w in zip(PAIRS, WEIGHTS, strict=True)], {}),
    "text": ([{**row, "weight": w} for row, w in zip(TEXT, WEIGHTS, strict=True)], {}),
    "turns": (TURNS, {"assistant_only_loss": True}),
    "packed": (
        WEIGHTED_PACKED := [{**TURNS[0], "weight": 0.5}, *TURNS[1:]],
        {
            "packing": True,
            "max_length": 64,
            "assistant_only_loss": True,
        },
    ),
    "padding free": (
        TURNS,
        {
            "padding_free": True,
            "max_length": None,
            "assistant_only_loss": True,
        },
    ),
    "cut": (
        [{**row, "weight": w} for row, w in zip(PAIRS, WEIGHTS, strict=True)],
        {"max_length": 24, "truncation_mode": "keep_end"},
    ),
}


@pytest.mark.cell(SFT_TRAINER, "loss", "gradient", "packing")
@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_of_records_and_turns_reach_the_loss(make, kind):
    """A token's weight is that of its row: rows differ in their texts, so ids tell them apart."""
    data, settings = WEIGHTED[kind]
    trainer = make(BFTSFTTrainer, data, {"scheme": "sft", "normalize": "token"}, **settings)
    plain = [{k: v for k, v in row.items() if k != "weight"} for row in data]
    plain = [
        row
        if "messages" not in row
        else {"messages": [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]}
        for row in plain
    ]
    other = make(trl.SFTTrainer, plain, **settings)
    with_weights, without = (list(t.train_dataset) for t in (trainer, other))
    assert len(with_weights) == len(without)
    found = {}
    for row, own in zip(with_weights, without, strict=True):
        assert row["input_ids"] == own["input_ids"]
        assert row["labels"] == own["labels"]
        assert len(row["token_weight"]) == len(row["labels"])
        lengths = row.get("seq_lengths") or [len(row["labels"])]
        assert lengths == (own.get("seq_lengths") or lengths)
        edges = np.cumsum([0, *lengths])
        for a, b in itertools.pairwise(edges):
            factors = {
                w
                for w, x in zip(row["token_weight"][a:b], row["labels"][a:b], strict=True)
                if x != -100
            }
            rest = {
                w
                for w, x in zip(row["token_weight"][a:b], row["labels"][a:b], strict=True)
                if x == -100
            }
            assert len(factors) == 1
            assert rest <= {0.0}
            found[tuple(row["input_ids"][a:b])] = factors.pop()
    want = [
        w * row.get("weight", 1.0) if kind == "packed" else w
        for row, w in zip(data, WEIGHTS, strict=True)
    ]
    assert sorted(found.values()) == pytest.approx(sorted(want), rel=1e-6)

    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["token_weight"].shape == batch["labels"].shape
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    factor = torch.nn.functional.pad(batch["token_weight"][:, 1:], (0, 1))
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "token_weight")}
    unpatch_model(model)
    logits = model(**inputs).logits.flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, target.flatten(), reduction="none")
    expected = (nll * factor.flatten()).sum() / (target != -100).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    grads = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


SHAREGPT = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b", "weight": 0.5}]


def named(key):
    """Chats whose answers have one key more."""
    return [
        {"messages": [{**m, **({key: 0.5} if m["role"] == "assistant" else {})} for m in messages]}
        for messages in (row["messages"] for row in CHAT)
    ]


def test_weights_of_tokenised_rows_and_of_streams(make, tokenizer, tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    rows = [{**row, "token_weight": [0.5, 1.0, 2.0, 3.0]}] * 4 + [
        {**row, "token_weight": [1.0] * 4}
    ]
    trainer = make(BFTSFTTrainer, rows, packing=True, max_length=8)
    assert trainer.train_dataset[0]["token_weight"][:4] == [0.5, 1.0, 2.0, 3.0]
    assert trainer.train().training_loss != 0
    later = [PAIRS[0], {**PAIRS[1], "weight": 0.25}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(later * 4))
    trainer = make(BFTSFTTrainer, PAIRS)
    prepared = trainer._prepare_dataset(stream, tokenizer, trainer.args, False, None, "train")
    first, second = list(prepared)[:2]
    assert set(first["token_weight"]) <= {0.0, 1.0}
    assert set(second["token_weight"]) == {0.0, 0.25}
    stream = datasets.IterableDataset.from_generator(lambda: iter([{**PAIRS[0], "weights": 0.5}]))
    prepared = trainer._prepare_dataset(stream, tokenizer, trainer.args, False, None, "train")
    with pytest.raises(ValueError, match="row 0: got a column 'weights', expected 'weight'"):
        list(prepared)


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        (TURNS, {}, r"row 0: 'messages\[1\].weight'.*assistant_only_loss=False, expected True"),
        (named("wieght"), {}, r"train dataset: 'messages\[0\]': got the key 'wieght'"),
        (
            [{"prompt": TURNS[1]["messages"][:2], "completion": TURNS[1]["messages"][2:]}] * 4,
            {},
            r"row 0: 'prompt\[1\].weight': got -0.5, expected none: a prompt has no labels",
        ),
        (
            [{"conversations": SHAREGPT}] * 4,
            {},
            r"messages\[1\].weight'.*assistant_only_loss=False",
        ),
        ([{**row, "weight": "much"} for row in PAIRS], {}, "row 0: 'weight': expected a number"),
        ([{**row, "weight": [1.0, 2.0]} for row in PAIRS], {}, "row 0: 'weight': got 2 numbers"),
        (
            [{**row, "weight": 0.5, "input_ids": [5, 6], "labels": [5, 6]} for row in PAIRS],
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "train_dataset: got a column weight in data that are not prepared",
        ),
    ],
)
def test_weights_that_cannot_be_placed_are_refused(make, data, settings, says):
    with pytest.raises(ValueError, match=says):
        make(BFTSFTTrainer, data, **settings)


def test_a_mixture_of_experts_has_trls_coefficient(make):
    options = {"scheme": "dft", "normalize": "token"}
    experts = {"num_local_experts": 3, "experts_implementation": "eager", "vocab_size": 400}
    settings = {"gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.5}
    ours, own = (
        make(kind, model=tiny("MixtralForCausalLM", **experts), **settings, **more)
        for kind, more in (
            (BFTSFTTrainer, {"options": options}),
            (trl.SFTTrainer, {"loss_type": "dft"}),
        )
    )
    assert_same_run(ours, own)


@pytest.mark.cell(SFT_TRAINER, "accumulation", "packing")
@pytest.mark.parametrize(
    "kind", ["packed", *(pytest.param(k, marks=pytest.mark.slow) for k in ("chat", "lora"))]
)
def test_the_balanced_loss_is_the_same_however_the_step_is_cut(make, kind):
    """And packed: its documents are counted, not rows."""
    data, settings = KINDS[kind]
    results = []
    for cut in (
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "packing": False},
    ):
        trainer = make(BFTSFTTrainer, data, {"window": 4}, **settings | cut | {"max_steps": 1})
        assert (len(trainer.train_dataset) < 8) == (kind == "packed" and trainer.args.packing)
        trainer.train()
        results.append((weights(trainer), trainer.state.log_history[0]))
    (whole, logged), (cut, again) = results
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)
    for name in ("loss", "nll", "confidence", "token_weight", "sequence_weight"):
        assert again[name] == pytest.approx(logged[name], rel=1e-4)
    assert 0 < logged["sequence_weight"] < 1


@pytest.mark.cell(SFT_TRAINER, "save", "resume")
def test_a_packed_run_is_resumed_and_its_adapter_loads(make, tmp_path):
    data, settings = KINDS["packed"]
    keep = {**settings, "peft_config": LORA, "save_strategy": "steps", "save_steps": 1}
    whole, resumed = (make(BFTSFTTrainer, data, {"window": 4}, **keep) for _ in range(2))
    whole.train()
    want = weights(whole)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(weights(resumed), want, rtol=0, atol=0)
    base = unpatch_model(make(BFTSFTTrainer, data).model)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-2").eval()
    ids = torch.tensor([[3, 4, 5]])
    got, own = (model(ids).logits for model in (loaded, whole.model.eval()))
    torch.testing.assert_close(got, own, rtol=0, atol=1e-6)


@pytest.mark.cell(SFT_TRAINER, "evaluation")
def test_an_evaluation_gets_the_logits_and_computes_none_for_nobody(make, monkeypatch):
    metrics = {"compute_metrics": lambda found: {"mean": float(found.predictions.mean())}}
    ours, own = (make(kind, options=metrics) for kind in (BFTSFTTrainer, trl.SFTTrainer))
    want, got = (trainer.predict(trainer.eval_dataset).predictions for trainer in (own, ours))
    np.testing.assert_array_equal(got, want)
    assert ours.evaluate()["eval_mean"] == own.evaluate()["eval_mean"]
    ours.compute_metrics = None
    monkeypatch.setattr(DeferredLogits, "read", None)
    ours.evaluate()
    ids = torch.tensor([[3, 4, 5]])
    outputs = unpatch_model(ours.model)(ids, labels=ids)
    assert type(outputs.logits) is torch.Tensor


def test_trls_loss_type_is_refused(make):
    with pytest.raises(ValueError, match=r"^loss_type: got 'dft', expected none: scheme='dft' and"):
        make(BFTSFTTrainer, loss_type="dft")

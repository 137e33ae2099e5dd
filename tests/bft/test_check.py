"""`bft check` finds nothing where all is well, and finds what is broken on purpose."""

import json

import pytest
import torch
import transformers as hf

from bft import check as module
from bft.cli import main
from bft.loss import HeadLoss
from tests.support.models import tiny_config


class Shifted(hf.LlamaForCausalLM):
    """A model that adds to some of its logits, which the op cannot express."""

    def forward(self, **kwargs):
        labels = kwargs.pop("labels", None)
        output = super().forward(**kwargs)
        output.logits = output.logits + torch.eye(1, 400, device=output.logits.device)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, 400)
        return output


class Lossless(hf.LlamaForCausalLM):
    """A model that leaves the loss to its trainer."""

    def forward(self, **kwargs):
        kwargs.pop("labels", None)
        return super().forward(**kwargs)


class Unlabelled(hf.LlamaForCausalLM):
    """A model that has never heard of labels."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, use_cache=None, return_dict=None
    ):
        options = {"use_cache": use_cache, "return_dict": return_dict}
        return super().forward(input_ids, attention_mask, position_ids, **options)


@pytest.fixture
def checked(tmp_path, checkpoint_of, data_file, fresh_accelerator):
    """Saves a model, runs the command on it, returns its status and each row's verdict."""

    def run(*flags, kind="LlamaForCausalLM", data=data_file):
        folder = checkpoint_of(tmp_path / kind, kind, num_hidden_layers=1, tie_word_embeddings=True)
        output = tmp_path / "table.json"
        where = ["--model", str(folder), "--file", str(data), "--output", str(output)]
        status = main(["check", *where, "--window", "4", *flags])
        rows = json.loads(output.read_text())
        return status, {row["what"]: row["verdict"] for row in rows}

    return run


PACKED = "packed rows, beside each by itself"
SAVED = "saved and loaded again"
LORA = "LoRA merged, saved and loaded again"
LOSS = "loss, beside the model's own"
GRADIENTS = "gradients, beside the model's own"
WEIGHTED = "bft loss, beside the formula on its logits"
WEIGHTED_GRADIENTS = "bft gradients, beside the formula on its logits"
ADAPTED, ADAPTED_GRADIENTS = (f"LoRA on the head, {row}" for row in (WEIGHTED, WEIGHTED_GRADIENTS))
ADAPTED_SAVED = "LoRA on the head merged, saved and loaded again"


@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", ""), ("bfloat16", ""), ("float32", ', "weight": -0.5}')]
)
def test_all_is_well(checked, dtype, weights, data_file, tmp_path, capsys):
    text = data_file.read_text(encoding="utf-8").replace("}", weights or "}", 2)
    data = tmp_path / "weighted.jsonl"
    data.write_text(text, encoding="utf-8")
    status, verdicts = checked("--dtype", dtype, data=data)
    assert status == 0
    assert set(verdicts.values()) == {"ok"}
    rows = {PACKED, SAVED, LORA, LOSS, GRADIENTS, WEIGHTED, WEIGHTED_GRADIENTS}
    rows |= {ADAPTED, ADAPTED_GRADIENTS, ADAPTED_SAVED}
    assert rows < verdicts.keys()
    printed = capsys.readouterr().out
    assert "records" in printed
    assert "limit" in printed
    assert ("1e-01" if dtype == "bfloat16" else "1e-03") in printed  # of gradients


@pytest.mark.parametrize("flags", [(), ("--limit", "1")], ids=["four", "one"])
def test_a_model_that_cannot_pack_is_told_so(checked, flags):
    status, verdicts = checked(*flags, kind="FalconForCausalLM")
    assert status == 0  # training would refuse it, too
    assert verdicts.pop(PACKED) == "refused"
    assert set(verdicts.values()) == {"ok"}


def test_a_model_that_sees_its_answers_is_wrong(checked):
    status, verdicts = checked(kind="BertLMHeadModel")
    assert status == 1
    assert [name for name, verdict in verdicts.items() if verdict == "WRONG"] == [
        "later tokens seen by earlier positions"
    ]


def test_a_model_that_the_op_cannot_express_is_wrong(checked, monkeypatch):
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", loads(Shifted))
    status, verdicts = checked()
    assert status == 1
    assert verdicts["patch"] == "WRONG"
    assert LOSS not in verdicts


@pytest.mark.parametrize("kind", [Lossless, Unlabelled])
def test_a_model_without_a_loss_of_its_own_is_compared_with_the_formula(checked, monkeypatch, kind):
    monkeypatch.setattr(module, "_saved", lambda *_: [])  # would load another kind of model
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", loads(kind))
    status, verdicts = checked()
    assert status == 0
    assert verdicts.pop(LOSS) == "not compared"
    assert GRADIENTS not in verdicts
    assert verdicts[WEIGHTED_GRADIENTS] == "ok"
    assert set(verdicts.values()) == {"ok"}


def loads(kind):
    """In the place of ``from_pretrained``."""
    config = tiny_config("LlamaConfig", vocab_size=400)
    return lambda folder, **_: (kind(config), {"missing_keys": ()})


def faulty(change):
    """A loss of ``change(value, scheme)``."""

    def call(self, *args, **kwargs):
        value, stats = CALL(self, *args, **kwargs)
        return change(value, self.scheme), stats

    return call


def of_moving_weights(value, scheme):
    """The right value, and a gradient that goes through the weights, too."""
    square = value * value
    return value if scheme == "sft" else value + (square - square.detach()) / 2


def with_other_weights(accelerator, model, tokenizer, folder):
    parameter = next(model.parameters())
    kept = parameter.detach().clone()
    parameter.data.mul_(1.01)
    SAVE(accelerator, model, tokenizer, folder)
    parameter.data.copy_(kept)


CALL, SAVE = HeadLoss.__call__, module.save_model
CALLED, ALL_GRADIENTS = (HeadLoss, "__call__"), {GRADIENTS, WEIGHTED_GRADIENTS, ADAPTED_GRADIENTS}


@pytest.mark.parametrize(
    ("where", "fault", "wrong"),
    [
        (CALLED, faulty(lambda value, _: value * 1.01), {LOSS, WEIGHTED, ADAPTED} | ALL_GRADIENTS),
        (CALLED, faulty(lambda value, _: (value + value.detach()) / 2), ALL_GRADIENTS),
        (CALLED, faulty(of_moving_weights), {WEIGHTED_GRADIENTS, ADAPTED_GRADIENTS}),
        ((module, "save_model"), with_other_weights, {SAVED, LORA, ADAPTED_SAVED}),
    ],
    ids=["loss", "gradient", "weighted gradient", "saved model"],
)
def test_what_is_broken_is_found(checked, monkeypatch, where, fault, wrong):
    monkeypatch.setattr(*where, fault)
    status, verdicts = checked()
    assert status == 1
    assert {row for row, verdict in verdicts.items() if verdict == "WRONG"} == wrong

"""What is loaded from a run's folder gives the numbers of its last evaluation."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft.evaluate import evaluate
from bft.head import UnsupportedModel
from bft.records import read_jsonl
from bft.train import train
from tests.support.runs import unevaluated


@pytest.fixture(scope="module")
def models(checkpoint_of, tmp_path_factory):
    """Tied, untied, both with a vocabulary resized to one with rows to spare, and a GPT-2."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        made[name] = checkpoint_of(folder / name, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(made[name])
        torch.manual_seed(1)
        model.resize_token_embeddings(420, pad_to_multiple_of=64)
        made[f"{name}-resized"] = checkpoint_of(folder / f"{name}-resized", model)
    return made | {"gpt2": checkpoint_of(folder / "gpt2", "GPT2LMHeadModel")}


def nll(model, config):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    records = read_jsonl(config.eval_file, limit=config.eval_limit)
    return evaluate(model, tokenizer, records, progress=False).nll


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (name, targets)
        for name in ("tied", "untied", "tied-resized", "untied-resized")
        for targets in ((), ("all-linear",), ("embed_tokens", "q_proj"))
    ]
    + [("gpt2", ()), ("gpt2", ("c_attn", "wte"))],
)
def test_folder_and_adapter_give_the_last_evaluation(config, models, name, targets):
    config = replace(config, model=str(models[name]), learning_rate=3e-2, steps=8)
    if targets:
        config = replace(config, lora_rank=4, lora_targets=targets)
    result = train(config)
    before, after = (result.evaluations[place]["nll"] for place in (0, -1))
    assert abs(after - before) > 0.05  # far enough for another model to show
    written = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert nll(written, config) == pytest.approx(after, abs=2e-5)
    if targets:
        base = AutoModelForCausalLM.from_pretrained(config.model)
        adapted = PeftModel.from_pretrained(base, result.model_dir / "adapter")
        assert nll(adapted, config) == pytest.approx(after, abs=2e-5)


def test_only_what_learned_apart_is_untied(config, models, caplog):
    config = unevaluated(config, model=str(models["tied"]), lora_rank=4, steps=2)
    for targets, tied in ((("q_proj",), True), (("embed_tokens",), False)):
        folder = config.output_dir / targets[0]
        with caplog.at_level(logging.WARNING):
            written = train(replace(config, lora_targets=targets, output_dir=folder)).model_dir
        assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is tied
        weights = load_file(written / "model.safetensors")
        assert ("lm_head.weight" in weights) is not tied
        assert ("tie_word_embeddings=false" in caplog.text) is not tied


def test_bfloat16_parameters_differ_by_one_rounding(config, models):
    """The adapter is added in float32 and rounded once, to the type that the base is loaded in."""
    config = replace(config, dtype="bfloat16", learning_rate=1e-2, steps=8)
    for name, targets in (("untied", ()), ("tied", ("embed_tokens", "q_proj"))):
        config = replace(
            config,
            model=str(models[name]),
            lora_rank=4 if targets else 0,
            lora_targets=targets or ("all-linear",),
            output_dir=config.output_dir / name,
        )
        result = train(config)
        written = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
        assert written.dtype == torch.bfloat16
        last = result.evaluations[-1]["nll"]
        assert nll(written, config) == pytest.approx(last, abs=2e-2 if targets else 1e-6)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_an_adapter_on_the_head_is_refused(config, models, name):
    config = replace(config, model=str(models[name]), lora_rank=4)
    with pytest.raises(UnsupportedModel, match=r"carries an adapter .* Leave it out of target_mod"):
        train(replace(config, lora_targets=("lm_head", "q_proj")))

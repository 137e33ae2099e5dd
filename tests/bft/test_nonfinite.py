"""NaN and infinities: the run stops before they reach the model, and says where they came from."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft import train as train_module
from bft.cli import main
from bft.nonfinite import NonFinite, broken_parameter, first_broken
from bft.train import train
from tests.support.runs import checkpoints, metrics, strict_json


@pytest.fixture
def one_bad_record(config, checkpoint_of, tmp_path):
    """A run whose model overflows at one character, which the record on line 14 holds."""
    folder = checkpoint_of(tmp_path / "overflows", "GPT2LMHeadModel", tie_word_embeddings=False)
    lines = config.train_file.read_text(encoding="utf-8").splitlines()
    lines[13] = lines[13].replace("colour", "~")
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder)("~").input_ids[0]
    torch.nn.init.constant_(model.transformer.wte.weight[token], 3e38)
    model.save_pretrained(folder)
    return replace(config, model=str(folder), train_file=data, batch_size=2, accumulation=2)


def test_a_run_that_diverges_stops_before_the_step(config, flags, capsys):
    config = replace(config, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0.0)
    assert main(["train", *flags(config)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bft train: step 2: the ")
    assert " is nan; " in line
    assert f"4 of 4 records: {config.train_file}:" in line
    assert "--on-nonfinite skip" in line
    assert not (config.output_dir / "model").exists()
    assert [row["kind"] for row in metrics(config.output_dir)] == ["eval", "train"]


def test_the_record_is_named_and_the_checkpoint_before_is_kept(one_bad_record):
    config = replace(one_bad_record, save_every=1, keep_checkpoints=1, seed=1)
    with pytest.raises(NonFinite) as stop:
        train(config)
    said = str(stop.value)
    step = int(said.split()[1].rstrip(":"))
    assert step > 1
    assert f"step {step}: the loss is nan; 1 of 4 records: {config.train_file}:14. No model" in said
    assert f"--resume (from step-{step - 1:07d}) with --on-nonfinite skip" in said
    assert checkpoints(config.output_dir) == [f"step-{step - 1:07d}"]
    result = train(replace(config, resume=True, on_nonfinite="skip"))
    assert [row["step"] for row in result.history if row["skipped"]] == [step]


def test_skipped_steps_are_counted_and_change_nothing(one_bad_record, caplog, tmp_path):
    config = replace(one_bad_record, on_nonfinite="skip", steps=5, gradient="sampled", eps=0.1)
    result = train(config)
    (skipped,) = [row["step"] for row in result.history if row["skipped"]]
    assert "This step's update is left out" in caplog.text
    assert "the updates of 1 of 5 steps were left out" in caplog.text
    (row,) = [row for row in metrics(config.output_dir) if row.get("skipped")]
    assert row["step"] == skipped
    assert row["loss"] is row["grad_norm"] is None
    for name, value in load_file(result.model_dir / "model.safetensors").items():
        assert torch.isfinite(value).all(), name
    # The schedule moves on, and looking for the record drew nothing from torch's generator.
    clean = replace(config, train_file=config.eval_file, output_dir=tmp_path / "clean")
    rates = [row["learning_rate"] for row in train(clean).history]
    assert [row["learning_rate"] for row in result.history] == rates
    again = train(replace(config, output_dir=tmp_path / "again"))
    first, second = ([x["nll"] for x in run.history if not x["skipped"]] for run in (result, again))
    assert first == second


def test_a_gradient_that_overflows_stops_the_run(config, before_call):
    """The loss is finite, the gradient is not: no record is to blame, so all are named."""

    def overflows(accelerator, model, *_):
        next(model.parameters()).grad.mul_(1e38).mul_(1e38)

    before_call(train_module, "clip", 1, overflows)
    with pytest.raises(NonFinite, match=r"step 1: the norm of the gradient is (nan|inf); 4 of 4 r"):
        train(config)


@pytest.fixture
def with_norm_weights_of(config, checkpoint_of, tmp_path):
    def run(value):
        model = AutoModelForCausalLM.from_pretrained(config.model)
        torch.nn.init.constant_(model.model.norm.weight, value)
        return replace(config, model=str(checkpoint_of(tmp_path / "broken", model)))

    return run


def test_a_model_of_nan_is_refused_wherever_it_is_loaded(with_norm_weights_of, flags, capsys):
    config = with_norm_weights_of(math.nan)
    common = ["--model", config.model, "--file", str(config.train_file)]
    for command in (["train", *flags(config)], ["eval", *common], ["check", *common]):
        assert main(command) == 1
        assert "holds an infinity or NaN in model.norm.weight, expected" in capsys.readouterr().err


def test_a_broken_model_is_named_at_the_first_evaluation(
    with_norm_weights_of, tmp_path, flags, capsys
):
    config = with_norm_weights_of(3e38)  # finite, and its logits are not
    assert main(["train", *flags(config)]) == 1
    assert "evaluation after step 0: nll is nan" in capsys.readouterr().err
    (row,) = metrics(config.output_dir)
    assert row["nll"] is row["perplexity"] is None
    numbers = tmp_path / "numbers.json"
    held_out = ["--file", str(config.eval_file), "--limit", "2", "--output", str(numbers)]
    assert main(["eval", "--model", config.model, *held_out]) == 1
    assert "bft eval: nll is nan: " in capsys.readouterr().err
    assert strict_json(numbers.read_text(encoding="utf-8"))["nll"] is None
    model = AutoModelForCausalLM.from_pretrained(config.model)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    assert broken_parameter(Accelerator(cpu=True), model) == "model.norm.weight"


def test_the_first_of_no_parameters_is_none():
    """As where all weights are of 8 bits, which have no infinity."""
    assert first_broken([]) == 0
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    assert first_broken([good]) == 0
    assert first_broken([good, bad, bad]) == 2


def test_no_checkpoint_is_made_of_a_broken_model(config, before_call):
    def breaks(optimizer, *_):
        torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], math.inf)

    before_call(torch.optim.AdamW, "step", 1, breaks)
    with pytest.raises(
        NonFinite, match=r"embed_tokens.weight is not finite any more; the model is not"
    ):
        train(replace(config, save_every=1))
    assert checkpoints(config.output_dir) == []

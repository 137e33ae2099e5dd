"""A run that dies resumes as the run that did not, or says why it cannot."""

import dataclasses
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from bft import train as train_module
from bft.checkpoint import CheckpointError
from bft.config import TrainConfig
from bft.same_run import MAY_CHANGE, differences
from bft.train import train
from tests.support.runs import assert_same_weights, checkpoints, unevaluated


def numbers(result):
    return [(row["loss"], row["grad_norm"]) for row in result.history]


# --- the same run --------------------------------------------------------------------------------


@pytest.mark.cell("bft train", "resume")
@pytest.mark.parametrize("draws", ["sampled", "sampled, lora on the head", "dropout"])
def test_a_step_that_draws_goes_on_with_its_own_draws(draws, config, checkpoint_of, tmp_path):
    """To the last bit; evaluations at other steps, and none, draw nothing."""
    if draws.startswith("sampled"):
        config = replace(config, gradient="sampled", eps=0.1)
        if draws != "sampled":
            config = replace(config, lora_rank=2, lora_targets=("q_proj", "lm_head"))
    else:
        model = checkpoint_of(tmp_path / "gpt2", "GPT2LMHeadModel", resid_pdrop=0.1)
        config = replace(config, model=str(model))
    config = replace(config, batch_size=2, accumulation=2, save_every=2, keep_checkpoints=9)
    whole = train(config)
    kept = shutil.move(whole.model_dir, tmp_path / "whole")
    for step in (4, 6):  # as if the run had died before
        shutil.rmtree(config.output_dir / "checkpoints" / f"step-{step:07d}")
    result = train(replace(config, resume=True, eval_every=1))
    assert numbers(result) == numbers(whole)
    assert_same_weights(result.model_dir, kept)
    assert [row["step"] for row in result.evaluations] == [0, 2, 3, 4, 5, 6]
    assert result.evaluations[-1]["nll"] == whole.evaluations[-1]["nll"]


def half_saved(self, output_dir):
    (Path(output_dir) / "half").write_text("")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("every", "owner", "name", "call", "act"),
    [
        (2, train_module, "training_step", 6, KeyboardInterrupt),
        (4, Accelerator, "save_state", 2, half_saved),  # of the last step, which is saved as well
    ],
    ids=["in a step", "in a save"],
)
def test_a_run_that_dies_resumes(config, before_call, every, owner, name, call, act):
    config = unevaluated(config, save_every=every)
    whole = train(replace(config, output_dir=config.output_dir / "whole"))
    before_call(owner, name, call, act)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoints(config.output_dir)[-1] == "step-0000004"
    result = train(replace(config, resume=True))
    assert numbers(result) == numbers(whole)
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(config.output_dir) == ["step-0000004", "step-0000006"]


# --- other settings ------------------------------------------------------------------------------


@pytest.fixture
def resumable(config):
    """A finished run of two steps, to be resumed."""
    config = unevaluated(config, steps=2, save_every=1)
    train(config)
    return replace(config, resume=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-6}, "learning_rate: saved 0.003, given 1e-06"),
        ({"steps": 1}, "steps: saved 2, given 1"),
        ({"steps": 3}, "steps: saved 2, given 3"),
        ({"steps": None, "epochs": 2.0}, "steps: saved 2, given 10"),
        ({"batch_size": 2}, "batch_size: saved 4, given 2"),
        ({"seed": 1, "scheme": "sft"}, 'scheme: saved "bft", given "sft"; seed: saved 0, given 1'),
        ({"lora_rank": 2}, "lora_rank: saved 0, given 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_setting_is_refused_by_name(resumable, changed, said):
    before = {path: path.read_bytes() for path in resumable.output_dir.glob("[!.]*.*")}
    with pytest.raises(CheckpointError, match=f"settings: {re.escape(said)}. Resume with"):
        train(replace(resumable, **changed))
    assert {path: path.read_bytes() for path in resumable.output_dir.glob("[!.]*.*")} == before


def test_other_records_another_template_and_another_model_are_refused(
    resumable, checkpoint_of, tmp_path
):
    lines = resumable.train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    data = tmp_path / "other.jsonl"
    encoded = r"settings: train_file \(as .* template\): saved [^;]*$"
    for line in (lines[3].replace("item 3?", "thing 3?"), lines[3].replace("}", ', "weight": 0}')):
        data.write_text("".join([*lines[:3], line, *lines[4:]]), encoding="utf-8")
        with pytest.raises(CheckpointError, match=encoded):
            train(replace(resumable, train_file=data))
    model = checkpoint_of(tmp_path / "other", tie_word_embeddings=True)
    other = replace(resumable, model=str(model))
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("<|end|>", "!<|end|>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=encoded):
        train(other)
    template.write_text(text, encoding="utf-8")
    assert train(other).steps == 2
    weights = load_file(model / "model.safetensors")
    torch.nn.init.ones_(weights["model.embed_tokens.weight"])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"settings: model \(contents\): saved [^;]*$"):
        train(other)


def test_what_no_number_depends_on_may_change(resumable, tmp_path):
    data = shutil.copy(resumable.train_file, tmp_path / "moved.jsonl")
    model = shutil.copytree(resumable.model, tmp_path / "moved")
    folder = resumable.output_dir.rename(tmp_path / "moved-run")
    moved = replace(
        resumable,
        train_file=Path(data),
        model=str(model),
        output_dir=folder,
        eval_file=Path(data),
        save_every=None,
        steps=None,
        epochs=0.4,  # of 20 records: 2 steps of 4
        backend="torch",
        max_buffer_mib=1,
        on_nonfinite="skip",
        gradient_checkpointing=True,
    )
    assert train(moved).evaluations[-1]["step"] == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume"] is False
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= MAY_CHANGE


def test_a_setting_newer_than_the_checkpoint_had_its_default():
    assert differences({"processes": 1}, {"processes": 1, "window": 256}) == []
    assert differences({"processes": 1}, {"processes": 2, "window": 8}) == [
        "processes: saved 1, given 2",
        "window: saved 256, given 8",
    ]

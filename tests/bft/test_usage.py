"""Flags and YAML: what they become, and what is refused, named as it was typed."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest
import yaml

from bft.cli import COMMANDS
from bft.config import EvalConfig, SettingError, TrainConfig
from bft.usage import in_flags, parse, yaml_flags


def train(data, *flags):
    return parse(TrainConfig, ["--train-file", str(data), *map(str, flags)], "bft train")


def from_yaml(data, text, *flags):
    path = data.parent / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return train(data, "--config", path, *flags)


def refused(config_type, arguments):
    with pytest.raises(SettingError) as error:
        parse(config_type, list(map(str, arguments)), "bft")
    return in_flags(str(error.value), config_type)


# --- YAML ----------------------------------------------------------------------------------------


def test_yaml_of_a_run_reads_back(data):
    lora = {"lora_rank": 2, "lora_targets": ("q_proj", "o")}
    config = TrainConfig(train_file=data, scheme="dft", steps=3, packing=True, **lora)
    assert from_yaml(data, config.to_yaml()) == config


def test_flags_override_the_file(data):
    config = from_yaml(data, "steps: 3\nepochs: null", "--epochs", "2")
    assert (config.steps, config.epochs) == (None, 2.0)
    config = from_yaml(data, "steps: null\nepochs: 2", "--steps=5")
    assert (config.steps, config.epochs) == (5, None)
    text = yaml.safe_dump({"window": 8, "packing": True})
    config = from_yaml(data, text, "--window", "9", "--no-packing")
    assert (config.window, config.packing) == (9, False)
    path = data.parent / "config.yaml"
    config = train(data, "--window", "7", f"--config={path}")
    assert (config.window, config.packing) == (7, True)


def test_a_value_is_what_stands_there(data):
    config = from_yaml(
        data,
        "mixed-precision: no\nlearning_rate: 2e-5\nsteps: ~\nlora_alpha: null\nseed: 007\n"
        "packing: yes\ntensorboard: off\noutput_dir: -run\nscheme: sft  # plain\n",
    )
    assert config == TrainConfig(
        train_file=data,
        mixed_precision="no",
        learning_rate=2e-5,
        seed=7,
        packing=True,
        tensorboard=False,
        output_dir=Path("-run"),
        scheme="sft",
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("window: 8\nsteps: [1\n", ":3: not valid YAML (expected ',' or ']'"),
        ("window: 8\n\tsteps: 1\n", ":2: not valid YAML (found character '\\t'"),
        ("- window\n", " holds sequence, expected a mapping"),
        ("window\n", " holds scalar, expected a mapping"),
        ("", " holds nothing, expected a mapping"),
        ("window: 8\nwindw: 9\n", ":2: there is no setting 'windw'; did you mean 'window'?"),
        ("zzz: 9\n", ":1: there is no setting 'zzz'; expected one of train_file, "),
        ("window: 8\nwindow: 9\n", ":2: 'window' comes twice"),
        ("window: {a: 1}\n", ":1: 'window': expected a value or a list of values"),
        ("packing: 3\n", ":1: 'packing': got '3', expected true or false"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(data, text, says):
    says = re.escape(f"--config: {data.parent}/config.yaml{says}")
    with pytest.raises(SettingError, match=f"^{says}"):
        from_yaml(data, text)


def test_files_that_are_no_yaml(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    for name, says in (
        ("no-such.yaml", "No such file or directory"),
        ("", "Is a directory"),
        ("latin.yaml", "not UTF-8"),
    ):
        with pytest.raises(SettingError, match=says) as error:
            yaml_flags(tmp_path / name, TrainConfig)
        assert f"--config: {tmp_path / name}" in str(error.value)
    assert "--config: got nothing" in refused(TrainConfig, ["--config"])


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr", "1e-4"], "--lr: there is no such flag; it is --learning-rate here"),
        (["--seed", str(2**32)], "--seed: got 4294967296, expected at most 4294967295"),
        (["--epochs", "0"], "--epochs: got 0.0, expected a number above 0"),
        (["--max-grad-norm", "nan"], "--max-grad-norm: got nan, expected a finite number"),
        (["--weight-decay", "-1"], "--weight-decay: got -1.0, expected a finite number at least"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio: got 1.5, expected a finite number between 0"),
        (["--gamma", "0", "--scheme", "bft-v1-code"], "--gamma: got 0.0"),
        (["--eps", "2", "--gradient", "sampled"], "--eps: got 2.0"),
        (["--steps", "5", "--epochs", "1"], "--steps: got 5 with --epochs=1.0, expected one of"),
        (["--resume", "--overwrite"], "resume, overwrite: got both, expected one of them"),
        (["--backend", "gpu"], "--backend: got 'gpu', expected 'auto' or one of ('cpu', "),
        (["--lora-alpha", "8"], "--lora-alpha: got 8.0, which does nothing without --lora-rank"),
        (["--lora-targets", "a", "b"], "--lora-targets: got a b, which does nothing without --lo"),
        (["--lora-rank", "2", "--lora-targets"], "--lora-targets: got no name"),
        (["--eval-every", "5"], "--eval-every: got 5, which does nothing without --eval-file"),
        (["--eval-limit", "5"], "--eval-limit: got 5, which does nothing without --eval-file"),
        (["--save-every", "0"], "--save-every: got 0, expected at least 1"),
        (["--scheme", "dft", "--window=4"], "--window: got 4, which --scheme=dft ignores"),
        (["--gamma", "2"], "--gamma: got 2.0, which --scheme=bft ignores; expected it with"),
        (["--eps", "0.1"], "--eps: got 0.1, which --gradient=exact ignores; expected it with "),
    ],
)
def test_a_setting_that_cannot_be_is_named_as_it_was_typed(data, flags, says):
    assert refused(TrainConfig, ["--train-file", data, *flags]).startswith(says)


# What makes a number count.
NEEDED = {"lora_alpha": {"lora_rank": 2}, "gamma": {"scheme": "bft-v1-code"}}
NEEDED |= {"eps": {"gradient": "sampled"}}
LEAST = {"seed": 0, "lora_rank": 0, "max_length": 2, "top_k": 0}


@pytest.mark.parametrize("config_type", [kind for kind, _ in COMMANDS.values()])
def test_numbers_of_every_command_are_checked(config_type, tmp_path):
    """None may be below the least that makes sense, none may be negative or no number."""
    file = tmp_path / "data.jsonl"
    names = {field.name: field for field in dataclasses.fields(config_type)}
    required = {
        name: file if field.type == "Path" else "x"
        for name, field in names.items()
        if field.default is dataclasses.MISSING
    }
    for name, field in names.items():
        kind = field.type.partition(" ")[0]
        for value in (-1, math.nan, math.inf) if kind == "float" else ():
            with pytest.raises(ValueError, match=f"^{name}: got {value}"):
                config_type(**required, **NEEDED.get(name, {}), **{name: value})
        if kind == "int":
            least = LEAST.get(name, 1)
            with pytest.raises(ValueError, match=f"^{name}: got .*, expected at least {least}"):
                config_type(**required, **{name: least - 1})
            with pytest.raises(TypeError, match=f"^{name}: got float, expected an int"):
                config_type(**required, **{name: 1.5})


def test_a_file_may_hold_what_another_run_needs(data):
    config = TrainConfig(train_file=data, window=4, gamma=2.0, gradient="sampled", eps=0.1)
    again = from_yaml(data, config.to_yaml(), "--scheme", "sft", "--gradient", "exact")
    assert (again.window, again.gamma, again.eps) == (4, 2.0, 0.1)


def test_names_in_a_message_and_in_a_path():
    path = "/data/train_file.jsonl"
    text = f"{path}:3: 9 tokens; expected max_length at most 4, with scheme=sft; model_type is none"
    assert in_flags(text, TrainConfig) == text.replace("max_l", "--max-l").replace("sch", "--sch")
    assert in_flags("model: a model: x", TrainConfig) == "--model: a model: x"


# --- files and folders ---------------------------------------------------------------------------


def test_paths_of_the_wrong_kind(data, tmp_path):
    file, folder, common = data, tmp_path, ["--train-file", data]
    for flags, says in (
        (["--train-file", folder], f"--train-file: {folder} is a folder, expected a JSONL file"),
        (["--train-file", folder / "x"], f"--train-file: there is no file {folder / 'x'}"),
        ([*common, "--eval-file", folder], "--eval-file: "),
        ([*common, "--output-dir", file], f"--output-dir: {file} is a file, expected a folder"),
        ([*common, "--output-dir", file / "a/b"], f"--output-dir: {file} is a file, expected a f"),
    ):
        assert refused(TrainConfig, flags).startswith(says)
    common = ["--model", "m", "--file", file]
    for flags, says in (
        (["--model", "m", "--file", folder], "--file: "),
        ([*common, "--output", folder], f"--output: {folder} is a folder, expected a file"),
        ([*common, "--output", file / "a"], f"--output: {file} is a file, expected a folder"),
    ):
        assert refused(EvalConfig, flags).startswith(says)
    config = parse(EvalConfig, [*map(str, common), "--output", str(folder / "a/b.json")], "bft")
    assert config.output == folder / "a/b.json"


def test_places_that_may_not_be_read_or_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    said = refused(TrainConfig, ["--train-file", data, "--output-dir", tmp_path / "a/b"])
    assert said.startswith(f"--output-dir: {tmp_path} may not be written")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    assert refused(TrainConfig, ["--train-file", data]).startswith(f"--train-file: {data} may not")


def test_a_pipe_is_a_file_to_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert train(tmp_path / "pipe").train_file == tmp_path / "pipe"

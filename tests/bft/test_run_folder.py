"""A folder belongs to one run at a time, and an older run in it is neither mixed in nor lost."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from bft import train as train_module
from bft.cli import main
from bft.config import SettingError
from bft.encode import DataError
from bft.ranks import start_accelerator
from bft.run_folder import FolderInUse, claimed
from bft.train import train
from tests.support.runs import metrics, unevaluated


def contents(folder):
    """Every file but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def used(config):
    """A finished run, with files beside it that it did not write."""
    config = unevaluated(config, steps=4, save_every=2, tensorboard=True)
    train(config)
    for name in ("notes.txt", "checkpoints/notes.txt", "table.md"):
        (config.output_dir / name).write_text("mine")
    return config


# --- an older run --------------------------------------------------------------------------------


def test_what_is_refused_leaves_the_older_run_as_it_was(used, tmp_path):
    before = contents(used.output_dir)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    remains = "holds an older run .*step-0000004, .*model, metrics.jsonl.*--resume.*--overwrite"
    part = r"model: .* is part of the run in .* would remove"
    for changed, error, says in (
        ({"steps": 2}, SettingError, remains),
        ({"train_file": broken, "overwrite": True}, DataError, "not valid JSON"),
        ({"model": str(used.output_dir / "model"), "overwrite": True}, SettingError, part),
    ):
        with pytest.raises(error, match=says):
            train(replace(used, **changed))
        assert contents(used.output_dir) == before


def test_without_a_checkpoint_there_is_nothing_to_resume(config):
    with pytest.raises(SettingError, match=r"there is no checkpoint in .*; leave --resume out to"):
        train(replace(config, resume=True))
    config = unevaluated(config, steps=1)
    train(config)
    with pytest.raises(SettingError, match="leave --resume out and give --overwrite to start"):
        train(replace(config, resume=True))
    with pytest.raises(SettingError, match=r"older run \(.*\); --overwrite removes it, or"):
        train(config)


def test_a_start_that_failed_leaves_the_folder_free(config, before_call):
    """It took no step, so that there is nothing to lose."""
    before_call(train_module, "take_steps", 1, MemoryError)
    with pytest.raises(MemoryError):
        train(replace(config, tensorboard=True))
    assert (config.output_dir / "tensorboard").exists()
    (config.output_dir / "notes.txt").write_text("mine")
    result = train(replace(config, steps=1))
    assert [row["step"] for row in result.evaluations] == [0, 1]
    assert not (config.output_dir / "tensorboard").exists()
    assert (config.output_dir / "notes.txt").exists()


def test_what_the_folder_refuses_is_a_wrong_flag(used, capsys, flags):
    assert main(["train", *flags(used)]) == 2
    assert capsys.readouterr().err.startswith("bft train: --output-dir: ")
    assert main(["train", *flags(replace(used, resume=True, seed=7))]) == 2
    assert "seed: saved 0, given 7" in capsys.readouterr().err


def test_overwrite_removes_the_older_run_and_nothing_else(used):
    (used.output_dir / "checkpoints" / ".step-0000006.partial").mkdir()
    result = train(replace(used, steps=1, save_every=1, tensorboard=False, overwrite=True))
    names = contents(used.output_dir).keys()
    assert {name for name in names if "notes" in name} == {"notes.txt", "checkpoints/notes.txt"}
    assert "table.md" in names
    assert not [name for name in names if "tensorboard" in name]
    assert {name.split("/")[1] for name in names if "step-" in name} == {"step-0000001"}
    assert len(metrics(used.output_dir)) == 1
    assert result.model_dir.is_dir()
    settings = yaml.safe_load((used.output_dir / "config.yaml").read_text())
    assert settings["overwrite"] is False  # how a start found its folder is no setting of the run


def test_a_model_of_no_run_is_left_alone(config):
    shutil.copytree(config.model, config.output_dir / "model")
    for overwrite in (False, True):
        with pytest.raises(SettingError, match=r"output_dir: .*model is of no run"):
            train(replace(config, overwrite=overwrite))
    assert contents(config.output_dir / "model") == contents(Path(config.model))


def test_other_files_are_no_run(config):
    (config.output_dir / "checkpoints").mkdir(parents=True)
    (config.output_dir / "checkpoints" / "step-0000009").write_text("a file")
    (config.output_dir / "notes.txt").write_text("mine")
    (config.output_dir / "config.yaml").write_text("steps: 1")
    assert train(replace(config, steps=1)).steps == 1


@pytest.mark.parametrize("name", ["run", "run/deeper"])
def test_a_file_where_the_folder_should_be_is_named(config, tmp_path, name):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SettingError, match=f"output_dir: got .*/{name}, expected a folder"):
        train(replace(config, output_dir=tmp_path / name))


# --- two runs at once ----------------------------------------------------------------------------


def test_a_run_holds_its_folder_until_it_ends(config, capsys, flags):
    with claimed(Accelerator(cpu=True), config):
        for other in (config, replace(config, overwrite=True), replace(config, resume=True)):
            with pytest.raises(FolderInUse, match=r"in use by process \d+ on \S+; wait"):
                train(other)
        assert main(["train", *flags(config)]) == 2
        error = capsys.readouterr().err
        assert f"--output-dir: {config.output_dir} is in use by process {os.getpid()} on" in error
        assert "Traceback" not in error
        assert contents(config.output_dir) == {}
    assert (config.output_dir / ".lock").exists()  # as a run leaves it that is killed
    assert train(config).steps == 6


def test_processes_that_do_not_find_each_other_do_not_start(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE: got 2, but accelerate runs 1 process"):
        start_accelerator(config)
    assert not config.output_dir.exists()

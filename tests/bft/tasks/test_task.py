"""Tasks: what is written, what is told of them, and a task of a user's own."""

import json
import re
from pathlib import Path

import pytest

from bft.cli import main
from bft.config import SettingError
from bft.records import read_jsonl
from bft.tasks import task
from bft.tasks.task import Built, Task

sklearn = pytest.importorskip("sklearn", reason="needs the extra study")
DOCS = Path(__file__).resolve().parents[3] / "docs"


def rows(split, count=4):
    return [
        {"prompt": f"{split} {n}?", "completion": f"{n}.", "id": f"{split}{n}", "group": split}
        for n in range(count)
    ]


def built(**splits):
    return Built({name: rows(name) for name in task.SPLITS} | splits, "ours\n")


def made(found):
    return Task(name="small", about="numbers", build=lambda seed: found)


def test_the_documents_task_is_built_by_its_command(tmp_path, monkeypatch, capsys):
    (text,) = re.findall(r"```python\n(.*?)```", (DOCS / "tasks.md").read_text("utf-8"), re.S)
    assert len(text.splitlines()) <= 40
    (tmp_path / "capitals.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["data", "capitals:TASK", "--output-dir", "made"]) == 0
    assert "country -> capital, in made: 3 train, 3 test" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in Path("made").iterdir()}
    assert first.keys() == {"NOTICE", "leak.json", *(f"{name}.jsonl" for name in task.SPLITS)}
    assert len(read_jsonl("made/train.jsonl")) == 3
    report = json.loads(first["leak.json"])
    assert report["floors"]["the gold completion"] == {"accuracy": 1.0}
    assert report["floors"]["the nearest training prompt's completion"] == {"accuracy": 0.0}
    assert main(["data", "capitals:TASK", "--output-dir", "made"]) == 0
    assert first == {path.name: path.read_bytes() for path in Path("made").iterdir()}
    assert main(["data", "capitals:TASK", "--output-dir", "other", "--seed", "1"]) == 0
    assert Path("other/train.jsonl").read_bytes() != first["train.jsonl"]


def test_floors_are_worked_by_hand():
    train = [
        {"prompt": "red small apple", "completion": "fruit."},
        {"prompt": "green tall tree", "completion": "plant."},
        {"prompt": "old tree of green", "completion": "plant."},
    ]
    test = [
        {"prompt": "a small apple", "completion": "fruit."},
        {"prompt": "a green tree", "completion": "bush."},
        {"prompt": "nothing known", "completion": "plant."},
    ]
    assert task.nearest(train, test)[:2] == [0, 1]
    report = task.leak(made(built()), train, test)["floors"]
    assert report["always 'plant.'"] == {"accuracy": pytest.approx(1 / 3)}
    near = report["the nearest training prompt's completion"]
    assert near["accuracy"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))  # of the last, any
    assert report["the gold completion"] == {"accuracy": 1.0}
    assert task.exact("no.", {"completion": "no"}) == {"accuracy": 0.0}
    assert task.exact(" yes. More", {"completion": "x", "answer": "yes."}) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (built(test=[]), r"splits: got .*'test': 0.*expected rows of train, validation, test"),
        (built(test=rows("train")), "id: got 'train0' in train and test"),
        (
            built(test=[{**row, "group": "train"} for row in rows("test")]),
            "group: got 'train' in train and test",
        ),
    ],
)
def test_splits_that_leak_or_lack_are_refused(found, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        task.write(made(found), tmp_path / "made", 0)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nope",
            "got 'nope', expected one of hpo, hpo-path, mondo, pubmed-conclusion, hub, or 'mod",
        ),
        ("nowhere:TASK", "'nowhere:TASK' cannot be imported .ModuleNotFoundError"),
        ("math:pi", "'math:pi' is of <class 'float'>, expected a bft.tasks.task.Task"),
    ],
)
def test_a_name_that_is_none_is_told(name, says, capsys):
    with pytest.raises(SettingError, match=says):
        task.find(name)
    assert main(["data", name]) == 2
    assert re.search(says, capsys.readouterr().err)

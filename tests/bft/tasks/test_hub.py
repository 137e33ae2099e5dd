"""Sets of the hub, from small files of the same layouts; and what is said where they cannot be had.

The files are as `hf download --local-dir` leaves them: JSONL or Parquet, in the sets' folders.
"""

import json

import pytest

from bft.cli import main
from bft.config import SettingError
from bft.packaged import PretrainedError
from bft.records import read_jsonl
from bft.tasks import hub, task

pytest.importorskip("sklearn", reason="needs the extra study")
datasets = pytest.importorskip("datasets", reason="needs the extra study")


def medqa(n, **changed):
    options = {letter: f"option {letter} of {n}" for letter in "ABCD"}
    letter = "ABCD"[n % 4]
    return {
        "question": f"Patient {n} has what?",
        "answer": options[letter],
        "options": options,
        "meta_info": "step1",
        "answer_idx": letter,
        "metamap_phrases": ["patient"],
    } | changed


def medmcqa(n, **changed):
    options = {f"op{letter}": f" option {letter} of {n}" for letter in "abcd"}
    return {"id": f"u-{n}", "question": f"Which of {n}?", "cop": n % 4, **options, "exp": None} | (
        changed
    )


def pubmedqa(n, **changed):
    return {
        "pubid": n,
        "question": f"Does {n} help?",
        "context": {
            "contexts": [f"We asked {n}.", "We saw it."],
            "labels": ["AIM", "RESULTS"],
            "meshes": ["Humans"],
            "reasoning_required_pred": ["y"],
            "reasoning_free_pred": ["y"],
        },
        "long_answer": f"It does for {n}.",
        "final_decision": ("yes", "no", "maybe")[n % 3],
    } | changed


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture
def few(monkeypatch):
    """Few questions held out."""
    for source in hub.SOURCES.values():
        for name in source.held_out:
            monkeypatch.setitem(source.held_out, name, 3)


def run(name, folder, out):
    assert main(["data", "hub", name, "--source", str(folder), "--output-dir", str(out)]) == 0
    for split in task.SPLITS:
        read_jsonl(out / f"{split}.jsonl")
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").open(encoding="utf-8")]
        for split in task.SPLITS
    }


@pytest.mark.usefixtures("few")
def test_medqa(tmp_path):
    same = medqa(3, question="patient 40 HAS what")  # but for marks the test's
    train = [*(medqa(n) for n in range(20)), medqa(7), same]
    jsonl(tmp_path / "set/phrases_no_exclude_train.jsonl", train)
    jsonl(tmp_path / "set/phrases_no_exclude_test.jsonl", [medqa(n) for n in range(40, 44)])
    splits = run("medqa", tmp_path / "set", tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 17,  # one came twice
        "validation": 3,
        "test": 4,
    }
    (row,) = (row for row in splits["test"] if "Patient 41 " in row["prompt"])
    assert row["prompt"] == (
        "Patient 41 has what?\nA. option A of 41\nB. option B of 41\nC. option C of 41\n"
        "D. option D of 41"
    )
    assert row["completion"] == row["choices"][row["answer_index"]] == "B. option B of 41"
    assert row["answer"] == "B."
    notice = (tmp_path / "out/NOTICE").read_text(encoding="utf-8")
    assert "huggingface.co/datasets/GBaker/MedQA-USMLE-4-options" in notice
    assert "train 17, validation 3, test 4; 1 left out" in notice
    floors = json.loads((tmp_path / "out/leak.json").read_text(encoding="utf-8"))["floors"]
    assert floors["the gold completion"] == {"accuracy": 1.0}


@pytest.mark.usefixtures("few")
def test_medmcqa_is_tested_on_its_validation(tmp_path):
    for name, rows in (
        ("train", [medmcqa(n) for n in range(12)]),
        ("validation", [medmcqa(n) for n in range(12, 16)]),
        ("test", [medmcqa(99, cop=-1)]),  # whose answers are not public
    ):
        parquet(tmp_path / f"set/data/{name}-00000-of-00001.parquet", rows)
    splits = run("medmcqa", tmp_path / "set", tmp_path / "out")
    assert {row["id"] for row in splits["test"]} == {"u-12", "u-13", "u-14", "u-15"}
    assert len(splits["train"]) == 9
    (row,) = (row for row in splits["test"] if row["id"] == "u-14")
    assert row["completion"] == "C. option c of 14"


@pytest.mark.usefixtures("few")
def test_pubmedqa_is_split_by_article(tmp_path):
    parquet(
        tmp_path / "set/pqa_labeled/train-00000-of-00001.parquet", [pubmedqa(n) for n in range(12)]
    )
    parquet(tmp_path / "set/pqa_artificial/train-00000-of-00001.parquet", [pubmedqa(77)])
    splits = run("pubmedqa", tmp_path / "set", tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 6,
        "validation": 3,
        "test": 3,
    }
    row = next(row for rows in splits.values() for row in rows if row["id"] == "5")
    assert row["prompt"] == "We asked 5. We saw it.\n\nDoes 5 help? Answer yes, no or maybe."
    assert row["completion"] == "Maybe. It does for 5."
    assert row["answer"] == row["choices"][row["answer_index"]] == "Maybe."
    again = run("pubmedqa", tmp_path / "set", tmp_path / "again")
    assert again == splits


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([medqa(1, answer_idx="E")], r"train, row 1: not a question of GBaker/.*ValueError"),
        ([medqa(1, options={"A": "x"})], r"train, row 1: not a question of GBaker/.*KeyError"),
        ([medqa(0), medqa(1, question=" ")], r"train, row 2: .*expected text in each"),
        ([{"question": "x", "options": {}}], r"no column 'answer_idx' among .*expected question,"),
    ],
)
def test_other_layouts_are_refused(tmp_path, rows, says, capsys):
    jsonl(tmp_path / "set/train.jsonl", rows)
    jsonl(tmp_path / "set/test.jsonl", [medqa(40)])
    with pytest.raises(SettingError, match=says):
        hub.task("medqa", str(tmp_path / "set")).build(0)
    out = tmp_path / "out"
    flags = ["--source", str(tmp_path / "set"), "--output-dir", str(out)]
    assert main(["data", "hub", "medqa", *flags]) == 2
    assert capsys.readouterr().err.startswith("bft data: --source: ")
    assert not out.exists()


def test_a_set_without_its_test_or_without_files_is_refused(tmp_path):
    jsonl(tmp_path / "set/train.jsonl", [medqa(1)])
    with pytest.raises(SettingError, match=r"has the splits \['train'\], expected 'test'"):
        hub.task("medqa", str(tmp_path / "set")).build(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainedError, match=r"source: .*empty cannot be loaded"):
        hub.task("medqa", str(tmp_path / "empty")).build(0)


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert main(["data", "hub", "pubmedqa", "--output-dir", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "the hub does not show 'qiaojin/PubMedQA' (" in told
    assert "hf download --repo-type dataset qiaojin/PubMedQA --local-dir FOLDER" in told
    assert not (tmp_path / "out").exists()
    # An earlier download is for the library to find.
    (tmp_path / "qiaojin___pub_med_qa").mkdir()
    hub._check_reached("qiaojin/PubMedQA", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hub"], "--name: got no set, expected one of medqa, medmcqa, pubmedqa after hub"),
        (["hub", "nope"], "--name: got 'nope', expected one of medqa, medmcqa, pubmedqa"),
        (["hpo", "medqa"], "--name: got medqa with --task=hpo, expected it after hub"),
        (["--source", "x"], "--source: got x with --task=None, expected it after hub"),
        (["hub", "medqa", "--source", "no/such/one"], "got 'no/such/one', expected a folder or"),
    ],
)
def test_flags_that_name_no_set_are_told(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

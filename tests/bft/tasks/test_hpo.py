"""The questions are clean, unambiguous and the same every time, and the splits do not leak."""

import json
import re
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from bft.records import read_jsonl
from bft.tasks import hpo
from bft.tasks.hpo import ROOT, SPLITS, SYSTEMS

EYE, EAR, BREAST = 478, 598, 769


def term(number, name, *parents, text=None, more=""):
    """A stanza of an OBO file."""
    defined = "" if text is None else f'\ndef: "{text}" [PMID:1 "x"]'
    above = "".join(f"\nis_a: HP:{parent:07d} ! its name" for parent in parents)
    return f"[Term]\nid: HP:{number:07d}\nname: {name}{defined}{above}{more}\n\n"


QUOTED = r"An eye, e.g. A blue one, \"so called\", that is odd. See PMID:1."
OBO = (
    "format-version: 1.2\ndata-version: hp/releases/2099-01-01\n\n"
    + term(118, "Phenotypic abnormality")
    + term(EYE, "Abnormality of the eye", 118, text="An abnormality of the whole eye.")
    + term(EAR, "Abnormality of the ear", 118)
    + term(BREAST, "Abnormality of the breast", 118)
    + term(1, '"Quoted" eye', EYE, text=QUOTED)
    + term(2, "Ear and eye", EYE, EAR, text="Both of them together are odd.")
    + term(3, "Odd eye", EYE, text="An eye that was once odd.", more="\nis_obsolete: true")
    + term(4, "Odd breast", BREAST, text="A breast that is rather odd.")
    + term(5, "Odd ear", EAR, text="An ear that is odd. It has no lobe.")
    + "[Typedef]\nid: has_part\nname: has part\n"
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An ontology of a few terms in place of the real one."""
    path = tmp_path / "small.obo"
    path.write_text(OBO, encoding="utf-8")
    monkeypatch.setattr(hpo, "obo_path", lambda: path)


@pytest.fixture(scope="module")
def terms():
    return hpo.parse_obo(hpo.obo_path().read_text(encoding="utf-8"))[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpo") / "new"
    hpo.build(folder)
    return folder


@pytest.fixture(scope="module")
def splits(built):
    return {
        name: [json.loads(line) for line in (built / f"{name}.jsonl").open(encoding="utf-8")]
        for name in SPLITS
    }


# --- parsing -------------------------------------------------------------------------------------


def test_only_unambiguous_defined_living_terms_of_the_systems_are_asked():
    version, terms = hpo.parse_obo(OBO)
    assert version == "hp/releases/2099-01-01"
    assert "HP:0000003" not in terms
    assert hpo.systems_of(terms)["HP:0000002"] == {"HP:0000478", "HP:0000598"}
    rows = hpo.questions(terms)
    assert [row["id"] for row in rows] == ["HP:0000001", "HP:0000005"]
    assert rows[0] == {
        "prompt": 'Which body system does ""Quoted" eye" affect? Define the term.',
        "completion": 'Eye. An eye, e.g. A blue one, "so called", that is odd.',
        "answer": "Eye.",
        "group": "HP:0000001",
        "id": "HP:0000001",
    }
    assert rows[1]["completion"] == "Ear. An ear that is odd. It has no lobe."


@pytest.mark.parametrize(
    ("definition", "short"),
    [
        ("Too few words.", None),
        ("Here are enough words. And more of them.", "Here are enough words. And more of them."),
        ("Just four words here. Then " + "word " * 40 + "end.", "Just four words here."),
        ("word " * 40 + "end.", None),
        ("This one has no full stop", None),
        ("Something of interest (PMID:1) is here.", None),
        ("A kidney that is odd. This term is for kidneys.", "A kidney that is odd."),
        ("A kidney that is odd. Note that it is odd.", "A kidney that is odd."),
        ("A kidney, i.e. Ren in Latin, is odd.", "A kidney, i.e. Ren in Latin, is odd."),
        ("A kidney with <b>bold</b> letters in it.", None),
        ("", None),
    ],
)
def test_definitions_are_quoted_by_whole_sentences(definition, short):
    assert hpo.shorten(definition) == short


# --- the real ontology ---------------------------------------------------------------------------


def test_the_systems_are_top_level_classes(terms):
    for system, phrase in SYSTEMS.items():
        assert terms[system].parents == (ROOT,)
        words = set(re.findall(r"[a-z]+", terms[system].name.lower()))
        assert set(re.findall(r"[a-z]+", phrase.lower())) - {"and"} <= words


def test_records_say_what_the_ontology_says(splits, terms):
    systems = hpo.systems_of(terms)
    for row in [row for rows in splits.values() for row in rows]:
        (system,) = systems[row["id"]]
        assert row["answer"] == f"{SYSTEMS[system]}."
        assert f'"{terms[row["id"]].name}"' in row["prompt"]
        assert row["completion"].startswith(row["answer"] + " ")
        definition = row["completion"].removeprefix(row["answer"] + " ")
        assert terms[row["id"]].definition.startswith(definition)
        assert 4 <= len(definition.split()) <= 24
        assert not re.search(r"PMID|https?:|HP:\d|<[a-z/]|\[|  |\n|obsolete", definition)


def test_there_is_enough_of_every_answer(splits):
    counts = {name: Counter(row["answer"] for row in rows) for name, rows in splits.items()}
    assert len(counts["train"]) == len(SYSTEMS) == 14
    assert counts["train"].total() > 5000
    assert min(counts["train"].values()) > 100
    assert counts["test"].total() > 500
    assert counts["validation"].total() > 250
    assert set(counts["test"]) == set(counts["train"])
    majority = max(counts["train"].values()) / counts["train"].total()
    assert majority < 0.25


def keys(rows, terms, what):
    if what == "parents":
        return {parent for row in rows for parent in terms[row["id"]].parents}
    if what == "name":
        return {terms[row["id"]].name.casefold() for row in rows}
    if what == "definition":
        return {row["completion"].removeprefix(row["answer"]).casefold() for row in rows}
    return {row[what] for row in rows}


@pytest.fixture(scope="module")
def other_seed(terms):
    return hpo.split(hpo.questions(terms), terms, 1)


@pytest.mark.parametrize("what", ["id", "group", "parents", "name", "definition", "prompt"])
def test_splits_share_nothing(terms, splits, other_seed, what):
    for parts in (splits, other_seed):
        found = [keys(parts[name], terms, what) for name in SPLITS]
        assert all(found)
        assert not any(one & other for one, other in combinations(found, 2))


def test_no_term_stands_above_or_below_one_of_another_split(splits, terms):
    for one, other in permutations(SPLITS, 2):
        assert not keys(splits[one], terms, "id") & keys(splits[other], terms, "parents")


def test_no_family_dominates_what_is_held_out_and_its_first_questions_are_a_sample(splits):
    largest = {name: max(Counter(row["group"] for row in splits[name]).values()) for name in SPLITS}
    assert largest["validation"] <= 25
    assert largest["test"] <= 25 < largest["train"]
    answers = Counter(row["answer"] for row in splits["test"][:160])
    assert len(answers) >= 12
    assert max(answers.values()) < 50


# --- files ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes(splits, other_seed, built, tmp_path):
    hpo.build(tmp_path)
    for path in built.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    assert all(other_seed[name] != splits[name] for name in SPLITS)


def test_the_folder_holds_the_licence_and_nothing_half_made(built):
    assert {p.name for p in built.iterdir()} == {"NOTICE", *(f"{name}.jsonl" for name in SPLITS)}
    notice = (built / "NOTICE").read_text(encoding="utf-8")
    version = hpo.parse_obo(hpo.obo_path().read_text(encoding="utf-8"))[0]
    assert notice.count(version) == 2
    assert "https://hpo.jax.org/app/license" in notice


@pytest.mark.usefixtures("small")
def test_other_files_stay_and_a_failure_leaves_the_old_ones(tmp_path, monkeypatch):
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    (folder / "test.jsonl").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            hpo.build(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["mine.txt", "test.jsonl"]
    assert (folder / "test.jsonl").read_text() == "old"
    hpo.build(folder)
    assert "affect? Define the term." in (folder / "test.jsonl").read_text()
    assert (folder / "mine.txt").read_text() == "kept"


def test_the_loader_reads_it(built):
    record = read_jsonl(built / "test.jsonl", limit=1)[0]
    assert record.pair is not None
    assert set(record.extra) == {"answer", "group", "id"}


@pytest.mark.usefixtures("small")
def test_the_table_counts_and_shows_a_sample(tmp_path):
    console = Console(record=True, width=100)
    hpo.main(tmp_path, console=console)
    text = console.export_text()
    rows = [line.strip("│ ").split() for line in text.splitlines() if line.startswith("│")]
    counts = {name: [n for n in numbers if n != "│"] for name, *numbers in rows}
    assert counts == {"Ear.": ["0", "0", "1"], "Eye.": ["0", "1", "0"], "all": ["0", "1", "1"]}
    sample = json.loads((tmp_path / "test.jsonl").read_text(encoding="utf-8"))
    assert f"prompt: {sample['prompt']}" in text

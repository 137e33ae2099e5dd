"""Diseases: what a record says, what a text is worth, and that nothing leaks."""

import json

import pytest

from bft.packaged import PretrainedError
from bft.tasks import mondo, task
from bft.tasks.hpo import Term, ancestors_of

pytest.importorskip("sklearn", reason="needs the extra study")
pyarrow = pytest.importorskip("pyarrow", reason="needs the extra study")


def stanza(name, text="", *, deprecated=False, **ancestors):
    found = {"MONDO:" + one: steps for one, steps in ancestors.items()}
    return {"label": name, "description": text, "ancestors": found, "deprecated": deprecated}


HUMAN = {mondo.HUMAN.removeprefix("MONDO:"): 2}
SMALL = {
    mondo.HUMAN: stanza("human disease", "A disease that humans have."),
    "MONDO:1": stanza("sarcoma", "A cancer  of connective\ntissue.", **{"0700096": 1}),
    "MONDO:2": stanza("soft sarcoma", "A sarcoma of soft tissue.", **HUMAN, **{"1": 1}),
    "MONDO:3": stanza("odd one", "Both of them together.", **HUMAN, **{"2": 1, "1": 1}),
    "MONDO:4": stanza("old one", "It is no longer used.", deprecated=True, **HUMAN, **{"1": 1}),
    "MONDO:5": stanza("cat sarcoma", "A sarcoma of the cat.", **{"1": 1}),
    "MONDO:6": stanza("undefined sarcoma", **HUMAN, **{"1": 1}),
}


def test_human_diseases_with_a_definition_are_asked(tmp_path):
    path = tmp_path / "small.json.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(json.dumps(SMALL).encode())
    terms = mondo.read(path)
    assert set(terms) == {"MONDO:1", "MONDO:2", "MONDO:3", "MONDO:6"}
    assert terms["MONDO:1"].definition == "A cancer of connective tissue."
    rows = {row["id"]: row for row in mondo.questions(terms)}
    assert set(rows) == {"MONDO:2", "MONDO:3"}  # that have a parent among human diseases
    assert rows["MONDO:3"] == {
        "prompt": 'Define the disease "odd one", and name its parents in Mondo.',
        "completion": "Both of them together. Parents: sarcoma; soft sarcoma.",
        "gold": {
            "parents": ["sarcoma", "soft sarcoma"],
            "ancestors": ["sarcoma", "soft sarcoma"],
            "parts": {"definition": [0, 22], "parents": [22, 54]},
        },
        "group": rows["MONDO:2"]["group"],  # they share a parent
        "id": "MONDO:3",
    }


def test_broad_diseases_are_left_out():
    def terms(below):
        chain = ["top", "broad", *(f"leaf{n}" for n in range(below))]
        return {
            one: Term(
                one, one, f"It is the disease {one}.", ("top" if n < 2 else "broad",) * (n > 0)
            )
            for n, one in enumerate(chain)
        }

    assert "broad" in {row["id"] for row in mondo.questions(terms(mondo.MOST_BELOW))}
    assert "broad" not in {row["id"] for row in mondo.questions(terms(mondo.MOST_BELOW + 1))}


ROW = {"gold": {"parents": ["Odd one", "Sarcoma"], "ancestors": ["Cancer", "Odd one", "Sarcoma"]}}


@pytest.mark.parametrize(
    ("text", "f1", "true", "no_answer"),
    [
        ("It is odd. Parents: odd one; sarcoma.", 1, 1, 0),
        ("Parents: Sarcoma; sarcoma; Cancer.\nParents: x", 2 * 1 / 4, 1, 0),
        ("Parents: sarcoma; kidney; liver", 2 * 1 / 5, 1 / 3, 0),
        ("Parents: .", 0, 0, 1),
        ("It is odd.", 0, 0, 1),
        ("", 0, 0, 1),
    ],
)
def test_scores_are_worked_by_hand(text, f1, true, no_answer):
    want = {"parent_f1": f1, "true_ancestor": true, "no_answer": no_answer}
    assert mondo.score(text, ROW) == pytest.approx(want)


@pytest.mark.slow
def test_nothing_of_the_real_ontology_leaks(tmp_path):
    try:
        terms = mondo.read(mondo.path())
    except PretrainedError as error:
        pytest.skip(str(error))
    task.write(task.find("mondo"), tmp_path / "one", 0)
    splits = {
        name: [json.loads(line) for line in (tmp_path / f"one/{name}.jsonl").open("rb")]
        for name in task.SPLITS
    }
    assert len(splits["train"]) > 10_000
    assert len(splits["test"]) == 500
    assert len(splits["validation"]) == 250
    above = ancestors_of(terms)
    for name, others in (("train", ("validation", "test")), ("validation", ("test",))):
        held_out = {row["id"] for other in others for row in splits[other]}
        parents = {p for one in held_out for p in terms[one].parents}
        for row in splits[name]:
            assert held_out.isdisjoint(above(row["id"]))
            assert row["id"] not in parents
            assert parents.isdisjoint(terms[row["id"]].parents)
    for row in splits["test"]:
        text, gold = row["completion"], row["gold"]
        parts = [text[start:end] for start, end in gold["parts"].values()]
        assert "".join(parts) == text
        assert terms[row["id"]].definition.startswith(parts[0])
        want = {"parent_f1": 1, "true_ancestor": 1, "no_answer": 0}
        assert mondo.score(text, row) == want
    task.write(task.find("mondo"), tmp_path / "two", 0)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

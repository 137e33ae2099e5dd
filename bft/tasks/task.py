"""What a task is, how its files are written, and what can be had on them without a model.

A task is one file with a :class:`Task`: of ``bft/tasks``, or your own, by its import path
(``bft data my_tasks:capitals``). docs/tasks.md shows one.
"""

import importlib
import json
import os
import pkgutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from bft.config import SettingError
from bft.metrics import naming, to_json

Row = dict[str, Any]  # a record of the JSONL: `prompt` and `completion`, `id`, `group`, and its own
SPLITS = ("train", "validation", "test")
NAMES = {
    "hpo": "bft.tasks.hpo",
    "hpo-path": "bft.tasks.hpo_path",
    "mondo": "bft.tasks.mondo",
    "pubmed-conclusion": "bft.tasks.pubmed_conclusion",
}


class Built(NamedTuple):
    """What a task's builder returns."""

    splits: dict[str, list[Row]]  # of SPLITS; no group is in two of them
    notice: str  # source and licence


def exact(prediction: str, row: Row) -> dict[str, float]:
    """Whether a text is the completion, or starts with the record's `answer`, if it has one."""
    gold, text = row.get("answer"), prediction.strip()
    right = text.startswith(gold) if gold else text == row["completion"].strip()
    return {"accuracy": float(right)}


def commonest(train: Sequence[Row]) -> str:
    """The answer, or else the completion, that most training rows have; ties: the first."""
    (text, _), *_ = Counter(row.get("answer") or row["completion"] for row in train).most_common(1)
    return str(text)


@dataclass(frozen=True)
class Task:
    """A task: a builder of records, and what a prediction is worth."""

    name: str
    about: str  # one line
    build: Callable[[int], Built]  # of a seed; the same seed gives the same bytes
    score: Callable[[str, Row], dict[str, float]] = exact  # numbers, each the better the higher
    constant: Callable[[Sequence[Row]], str] = commonest  # a prediction that looks at no prompt
    # More floors, {name: {metric: value}}, from the rows of train and test.
    floors: Callable[[Sequence[Row], Sequence[Row]], dict[str, dict[str, float]]] | None = None


def find(name: str) -> Task:
    """The task of this name, or at this import path ``package.module:task``.

    Raises:
        SettingError: there is none.
    """
    if name in NAMES:
        found = importlib.import_module(NAMES[name]).TASK
    elif ":" in name:
        try:
            found = pkgutil.resolve_name(name)
        except Exception as error:  # a module may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise SettingError(f"task: {name!r} cannot be imported ({reason})") from error
    else:
        known = ", ".join([*NAMES, "hub"])
        raise SettingError(f"task: got {name!r}, expected one of {known}, or 'module:name'")
    if not isinstance(found, Task):
        raise SettingError(f"task: {name!r} is of {type(found)}, expected a bft.tasks.task.Task")
    return found


@contextmanager
def needs_study(package: str) -> Iterator[None]:
    """Around an import of the extra ``study``. Raises SettingError where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingError(
            f"task: it needs {package}, which is not installed; run: "
            "pip install 'bft-kernels[study]'"
        ) from error


def check(built: Built) -> None:
    """Raises ValueError for splits that are missing, empty, or share a group or an id."""
    if set(built.splits) != set(SPLITS) or not all(built.splits.values()):
        got = {name: len(rows) for name, rows in built.splits.items()}
        raise ValueError(f"splits: got {got}, expected rows of {', '.join(SPLITS)}")
    for key in ("id", "group"):
        seen: dict[Any, str] = {}
        for name, rows in built.splits.items():
            for value in dict.fromkeys(row[key] for row in rows):
                if seen.setdefault(value, name) != name:
                    both = f"{seen[value]} and {name}"
                    raise ValueError(f"{key}: got {value!r} in {both}, expected it in one split")


def write(task: Task, folder: Path, seed: int) -> dict[str, Any]:
    """Writes the splits as JSONL, `NOTICE` and `leak.json`; returns what that holds.

    Each file appears whole or not at all; other files of the folder are left alone.
    """
    built = task.build(seed)
    check(built)
    report = leak(task, built.splits["train"], built.splits["test"])
    files = {"NOTICE": built.notice, "leak.json": to_json(report, indent=2) + "\n"}
    write_files(folder, files | lines_of(built.splits))
    return report


def lines_of(splits: dict[str, list[Row]]) -> dict[str, str]:
    """The splits as JSONL, by the names of their files."""
    return {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in splits.items()
    }


def counts_of(splits: Mapping[str, Sequence[Any]]) -> str:
    """The splits' names and sizes, as a NOTICE says them."""
    return ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Writes texts by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        for name, text in files.items():
            with naming(folder / name):
                Path(scratch, name).write_text(text, encoding="utf-8", newline="\n")
        for name in files:
            os.replace(Path(scratch, name), folder / name)


def leak(task: Task, train: Sequence[Row], test: Sequence[Row]) -> dict[str, Any]:
    """What can be had on the test rows without a model: ``{name: {metric: mean}}``, and counts.

    Raises:
        SettingError: scikit-learn is not installed.
    """
    copied = [train[place]["completion"] for place in nearest(train, test)]
    same = task.constant(train)
    found = {
        f"always {shorten(same, 60, placeholder=' ...')!r}": mean(
            task.score(same, row) for row in test
        ),
        "the nearest training prompt's completion": mean(
            task.score(text, row) for text, row in zip(copied, test, strict=True)
        ),
        "the gold completion": mean(task.score(row["completion"], row) for row in test),
    }
    if task.floors is not None:
        found |= task.floors(train, test)
    return {"task": task.name, "train": len(train), "test": len(test), "floors": found}


def mean(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each number."""
    rows = list(scores)
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def nearest(train: Sequence[Row], test: Sequence[Row]) -> list[int]:
    """For each test row the training row whose prompt is nearest, by words (tf-idf, cosine)."""
    with needs_study("scikit-learn"):
        from sklearn.feature_extraction.text import TfidfVectorizer
    vectors = TfidfVectorizer(token_pattern=r"\w+")
    known = vectors.fit_transform([row["prompt"] for row in train])
    asked = vectors.transform([row["prompt"] for row in test])
    return [int((known @ row.T).toarray().argmax()) for row in asked]


def main(task: Task, folder: Path, *, seed: int = 0, console: Console | None = None) -> None:
    """`bft data NAME`: builds the task, prints its sizes and the floors."""
    console = console or Console()
    report = write(task, folder, seed)
    metrics = sorted(set().union(*report["floors"].values()))
    columns = [Column(metric, justify="right") for metric in metrics]
    title = f"{task.about}, in {folder}: {report['train']} train, {report['test']} test"
    table = Table("test, without a model", *columns, title=title)
    for floor, values in report["floors"].items():
        cells = (format(values[metric], ".3f") if metric in values else "" for metric in metrics)
        table.add_row(floor, *cells)
    console.print(table)
    show_first(folder, console)


def show_first(folder: Path, console: Console) -> None:
    """Prints the first test row's prompt and completion."""
    with (folder / "test.jsonl").open(encoding="utf-8") as lines:
        sample: Row = json.loads(next(lines))
    for key in ("prompt", "completion"):
        console.print(f"{key}:", sample[key], markup=False, highlight=False)

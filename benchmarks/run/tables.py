"""``python -m benchmarks tables``: writes the tables of docs/ from CSVs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results.cells import Growth, Line, Losses, Modes, Repeated, Steps
from benchmarks.results.loss_table import markdown
from benchmarks.results.schema import RESULTS

ROOT = RESULTS.parent.parent
# Around each table, so that it is found again; a reader of the page does not see them.
_BEGIN = "<!-- table {name}: python -m benchmarks tables -->"
_END = "<!-- end of table -->"


@dataclass(frozen=True)
class Config:
    """Writes the tables between the markers of docs/ anew from benchmarks/results."""

    check: bool = False
    """Write nothing; fail where a document does not say what the CSVs say."""


_MEASURED = Losses(
    folder="epyc-zen5",
    tokens=2048,
    models={
        "smollm2-135m": "SmolLM2-135M",
        "qwen2.5-0.5b": "Qwen2.5-0.5B",
        "gemma3-270m": "Gemma-3-270M",
    },
    lines=(
        Line("eager", "eager"),
        Line("`torch.compile`d eager", "compiled eager"),
        Line(
            "cut-cross-entropy 25.1.1 (its `torch_compile`; drops small entries)",
            "cut-cross-entropy",
        ),
        Line(
            "`torch.nn.functional.linear_cross_entropy`, best of its chunk sizes",
            "torch chunked",
        ),
        Line("Liger-Kernel 0.8.5, chunked log-probabilities", "liger chunked"),
        Line("TRL 1.16.0, chunked log-probabilities", "trl"),
        Line("bft exact", "bft cpu exact"),
        Line("the same with a 256 MiB budget", "bft cpu exact, 256 MiB"),
        Line("the same with a 16 MiB budget", "bft cpu exact, 16 MiB"),
        Line("the same, frozen head", "bft cpu exact", mode="frozen"),
        Line("bft sampled", "bft cpu sampled", bold=True),
        Line("the same, frozen head", "bft cpu sampled", mode="frozen", bold=True),
        Line("bft, `no_grad`, all statistics", "bft cpu exact", mode="forward"),
    ),
)

# By the name in its markers: the document and what makes its cells.
TABLES: dict[str, tuple[str, Callable[[], list[list[str]]]]] = {
    "measured": ("docs/performance.md", _MEASURED),
    "again": ("docs/performance.md", Repeated(_MEASURED, "loss-again.csv")),
    "modes": ("docs/performance.md", Modes(_MEASURED, "smollm2-135m")),
    "steps": ("docs/performance.md", Steps("epyc-zen5", "smollm2-135m")),
    "steps-gemma": ("docs/performance.md", Steps("epyc-zen5", "gemma3-270m")),
    "growth": (
        "docs/performance.md",
        Growth(folder="epyc-zen5", provider="bft cpu sampled"),
    ),
}


def main(config: Config) -> None:
    """Writes, or checks.

    Raises:
        SystemExit: a row or a marker is missing, or, with ``check``, a document is not up to date.
    """
    old = {path: path.read_text(encoding="utf-8") for path in documents()}
    new = dict(old)
    for name, (document, cells) in TABLES.items():
        path = ROOT / document
        try:
            new[path] = replace(new[path], name, markdown(cells()))
        except ValueError as error:
            raise SystemExit(f"{document}: {error}") from None
    stale = [path for path in old if old[path] != new[path]]
    if config.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(
            f"{names}: its tables are not those of the CSVs; run python -m benchmarks tables"
        )
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
        print(path)


def documents() -> list[Path]:
    """All that have a table."""
    return list(dict.fromkeys(ROOT / document for document, _ in TABLES.values()))


def replace(text: str, name: str, table: str) -> str:
    """The document with this table between its markers.

    Raises:
        ValueError: it does not have the markers once.
    """
    begin = _BEGIN.format(name=name)
    between = re.compile(rf"({re.escape(begin)}\n).*?(\n{re.escape(_END)})", re.DOTALL)
    text, count = between.subn(lambda found: f"{found[1]}{table}{found[2]}", text)
    if count != 1:
        raise ValueError(f"table {name}: found {count} pairs of markers, expected 1 of {begin!r}")
    return text

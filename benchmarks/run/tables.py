"""``python -m benchmarks tables``: writes the tables of docs/performance.md from the CSVs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results.cells import Line, all_modes, growth, losses, repeated, steps
from benchmarks.results.loss_table import markdown
from benchmarks.results.schema import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "performance.md"
# Around each table, so that it is found again; readers of the page do not see these comments.
_BEGIN = "<!-- table {name}: python -m benchmarks tables -->"
_END = "<!-- end of table -->"


@dataclass(frozen=True)
class Config:
    """Writes the tables of the page again from benchmarks/results."""

    check: bool = False
    """Write nothing; fail if the page does not say what the CSVs say."""


_MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "gemma3-270m": "Gemma-3-270M",
}
LINES = (
    Line("eager", "eager"),
    Line("`torch.compile`d eager", "compiled eager"),
    Line(
        "cut-cross-entropy 25.1.1 (its `torch_compile`; drops small entries)", "cut-cross-entropy"
    ),
    Line("`torch.nn.functional.linear_cross_entropy`, best of its chunk sizes", "torch chunked"),
    Line("Liger-Kernel 0.8.5, chunked log-probabilities", "liger chunked"),
    Line("TRL 1.16.0, chunked log-probabilities", "trl"),
    Line("bft exact", "bft cpu exact"),
    Line("the same with a 256 MiB budget", "bft cpu exact, 256 MiB"),
    Line("the same with a 16 MiB budget", "bft cpu exact, 16 MiB"),
    Line("the same, frozen head", "bft cpu exact", mode="frozen"),
    Line("bft sampled", "bft cpu sampled", bold=True),
    Line("the same, frozen head", "bft cpu sampled", mode="frozen", bold=True),
    Line("bft, `no_grad`, all statistics", "bft cpu exact", mode="forward"),
)

_MEASURED = "epyc-zen5", 2048
# Each table by the name in its markers.
TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "measured": lambda: losses(*_MEASURED, _MODELS, LINES),
    "again": lambda: repeated(*_MEASURED, _MODELS, LINES, "loss-again.csv"),
    "modes": lambda: all_modes(*_MEASURED, "smollm2-135m"),
    "steps": lambda: steps("epyc-zen5", "smollm2-135m"),
    "steps-gemma": lambda: steps("epyc-zen5", "gemma3-270m"),
    "growth": lambda: growth("epyc-zen5", "bft cpu sampled"),
}


def main(config: Config) -> None:
    """Writes or checks the page; SystemExit if a check finds an old table."""
    old = new = PAGE.read_text(encoding="utf-8")
    for name, cells in TABLES.items():
        try:
            new = replace(new, name, markdown(cells()))
        except ValueError as error:
            raise SystemExit(f"{PAGE.name}: {error}") from None
    if config.check and old != new:
        raise SystemExit(
            f"{PAGE.name}: its tables are not those of the CSVs; run python -m benchmarks tables"
        )
    if old != new:
        PAGE.write_text(new, encoding="utf-8")
        print(PAGE)


def replace(text: str, name: str, table: str) -> str:
    """The page with this table between its markers; ValueError unless it has them once."""
    begin = _BEGIN.format(name=name)
    between = re.compile(rf"({re.escape(begin)}\n).*?(\n{re.escape(_END)})", re.DOTALL)
    text, count = between.subn(lambda found: f"{found[1]}{table}{found[2]}", text)
    if count != 1:
        raise ValueError(f"table {name}: found {count} pairs of markers, expected 1 of {begin!r}")
    return text

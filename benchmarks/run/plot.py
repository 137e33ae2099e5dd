"""``python -m benchmarks plot``: draws what `loss`, `gpu`, `scale` and `train` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from benchmarks.results import gain
from benchmarks.results.figures import render, save
from benchmarks.results.panels import growth_figures, loss_figures, train_figures
from benchmarks.results.schema import RESULTS, read

# The files that `loss` and `gpu`, `scale`, and `train` write, and what draws them.
FILES = {"loss.csv": loss_figures, "scale.csv": growth_figures, "train.csv": train_figures}


@dataclass(frozen=True)
class Config:
    """Draws time and memory, growth, fine-tuning steps and largest batches, as PNG."""

    folders: Positional[tuple[Path, ...]] = ()
    """Folders with a loss.csv, scale.csv or train.csv; all of benchmarks/results by default."""
    output: Path | None = None
    """A folder for the figures, instead of beside the CSVs; each of several `folders` gets one."""
    gain: Path | None = None
    """Draw README's figure alone, to this file (docs/gain.png)."""


def main(config: Config) -> None:
    """Draws, and prints what it wrote; SystemExit for a folder without a CSV."""
    if config.gain is not None:
        print(save(gain.draw(), config.gain, dpi=150))
        return
    folders = result_folders(config.folders)
    for folder in folders:
        to = config.output or folder
        if config.output is not None and len(folders) > 1:
            to = config.output / folder.name
        to.mkdir(parents=True, exist_ok=True)
        for file, draw in FILES.items():
            rows = read(folder / file)
            if not rows:
                print(f"{folder / file}: missing or empty, its figures are left out")
            for name, panels in draw(rows).items():
                print(save(render(panels), to / name))


def result_folders(given: Sequence[Path]) -> list[Path]:
    """The folders given, or all under ``benchmarks/results`` that hold a CSV."""
    if not given:
        return sorted({path.parent for name in FILES for path in RESULTS.glob(f"*/{name}")})
    for folder in given:
        if not any((folder / name).exists() for name in FILES):
            raise SystemExit(
                f"folders: got {folder}, expected one with some of {', '.join(FILES)} in it"
            )
    return list(given)

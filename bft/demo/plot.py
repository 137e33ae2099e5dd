"""Figures of a run."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bft.metrics import naming
from bft.train import TrainResult


def plot_run(result: TrainResult, path: Path, scheme: str) -> Path:
    """Training curves, and accuracy by answer before and after; written to ``path`` as PNG."""
    curves, bars = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")[1]
    _training_curves(curves, result.history, scheme)
    _accuracy_bars(bars, result.evaluations[0], result.evaluations[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        curves.figure.savefig(path, dpi=120)
    plt.close(curves.figure)
    return path


def _training_curves(axes: Any, history: list[dict[str, Any]], scheme: str) -> None:
    steps = [row["step"] for row in history]
    axes.plot(steps, [row["nll"] for row in history], color="C0", label="nll of a label (nats)")
    axes.plot(steps, [row["loss"] for row in history], color="C1", label=f"{scheme} loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(steps, [row["confidence"] for row in history], color="C2", label="mean confidence")
    other.set_ylim(0, 1)
    other.set_ylabel("mean confidence of a label")
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="upper right", fontsize=8)


def _accuracy_bars(axes: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    answers = sorted(after["per_answer"], key=lambda name: after["per_answer"][name]["examples"])
    for offset, row, label in ((-0.2, before, "pretrained"), (0.2, after, "fine-tuned")):
        counts = [row["per_answer"].get(name, {"correct": 0, "examples": 1}) for name in answers]
        shares = [count["correct"] / max(1, count["examples"]) for count in counts]
        places = [index + offset for index in range(len(answers))]
        axes.barh(places, shares, height=0.4, label=f"{label}: {row['accuracy']:.2f}")
    names = [f"{name.rstrip('.')} ({after['per_answer'][name]['examples']})" for name in answers]
    axes.set_yticks(range(len(answers)), names, fontsize=7)
    axes.axvline(after["majority_accuracy"], color="grey", linestyle=":", label="commonest answer")
    axes.set_xlim(0, 1)
    axes.set_xlabel("held-out questions right")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.1), ncol=3, frameon=False)

"""``bft demo``: a pretrained model learns biomedical answers, and is measured before and after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Column, Table

from bft.config import DemoConfig, TrainConfig
from bft.metrics import naming, write_json
from bft.packaged import cache_root
from bft.tasks import hpo
from bft.train import TrainResult, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def training(config: DemoConfig, data_dir: Path) -> TrainConfig:
    """The demo's training run."""
    return TrainConfig(
        train_file=data_dir / "train.jsonl",
        eval_file=data_dir / "test.jsonl",
        output_dir=config.output_dir,
        model=config.model,
        scheme=config.scheme,
        # An answer starts with one uncertain token, the body system, and goes on with certain ones.
        # A window of two leaves the first its full weight. Longer ones hold it back until it is
        # learned, which takes longer than a demo.
        window=2,
        gradient=config.gradient,
        steps=config.steps,
        batch_size=4,
        accumulation=4,
        learning_rate=3e-4,
        warmup_ratio=0.1,
        max_length=256,
        seed=config.seed,
        eval_limit=config.eval_limit,
        tensorboard=False,
        overwrite=config.overwrite or config.output_dir == DemoConfig().output_dir,
    )


def demo(config: DemoConfig) -> TrainResult:
    """Builds the data, trains, evaluates on held-out questions, and writes the table and figure."""
    console = Console()
    data_dir = cache_root() / "hpo"
    console.rule("Data: Human Phenotype Ontology")
    hpo.main(data_dir, seed=0, console=console)
    console.rule(f"Training: {config.model}, {config.scheme}")
    result = train(training(config, data_dir))
    before, after = result.evaluations[0], result.evaluations[-1]
    console.rule("Held-out questions")
    right = [Column(name, justify="right") for name in ("pretrained", "fine-tuned")]
    shown = Table("held out", *right)
    lines = ["| held out | pretrained | fine-tuned |", "|---|---:|---:|"]
    for name, *values in _comparison(before, after):
        shown.add_row(name, *values)
        lines.append(f"| {name.strip()} | {' | '.join(values)} |")
    console.print(shown)
    table = config.output_dir / "table.md"
    with naming(table):
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure = plot_run(result, config.output_dir / "figure.png", config.scheme)
    write_json(config.output_dir / "result.json", {"before": before, "after": after})
    console.print(f"model   {result.model_dir}\ntable   {table}\nfigure  {figure}")
    return result


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of name, before, after."""
    before = {**before, "majority_accuracy": after["majority_accuracy"]}
    for name, key, form in (
        ("body system right", "accuracy", ".3f"),
        ("  always the commonest", "majority_accuracy", ".3f"),
        ("nll of an answer token", "nll", ".3f"),
        ("confidence of an answer token", "confidence", ".3f"),
        ("token accuracy", "token_accuracy", ".3f"),
        ("questions", "examples", "d"),
        ("answer tokens", "tokens", "d"),
    ):
        yield name, format(before[key], form), format(after[key], form)


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

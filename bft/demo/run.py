"""``bft demo``: a pretrained model learns biomedical answers, and is measured before and after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bft.config import DemoConfig, TrainConfig
from bft.demo.plot import plot_run
from bft.metrics import naming, write_json
from bft.packaged import cache_root
from bft.tasks import hpo
from bft.train import TrainResult, train


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

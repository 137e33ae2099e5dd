"""``bft demo``: a pretrained model learns biomedical answers, and is measured before and after."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
        # An answer starts with one uncertain token, the body system, and goes on with certain ones,
        # the rest of its name. A window of two compares a token with the one before it and leaves
        # the first its full weight; longer ones hold it back until it is learned, which takes
        # longer than a demo.
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
    rows = comparison(before, after)
    console.rule("Held-out questions")
    console.print(rich_table(rows))
    table = config.output_dir / "table.md"
    with naming(table):
        table.write_text(markdown_table(rows), encoding="utf-8")
    figure = plot_run(result, config.output_dir / "figure.png", config.scheme)
    write_json(config.output_dir / "result.json", {"before": before, "after": after})
    console.print(f"model   {result.model_dir}\ntable   {table}\nfigure  {figure}")
    return result


def comparison(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, before, after."""

    def both(name: str, key: str, form: str) -> tuple[str, str, str]:
        return name, format(before[key], form), format(after[key], form)

    majority = format(after["majority_accuracy"], ".3f")
    return [
        both("body system right", "accuracy", ".3f"),
        ("  always the commonest", majority, majority),
        both("nll of an answer token", "nll", ".3f"),
        both("confidence of an answer token", "confidence", ".3f"),
        both("token accuracy", "token_accuracy", ".3f"),
        both("questions", "examples", "d"),
        both("answer tokens", "tokens", "d"),
    ]


def rich_table(rows: list[tuple[str, str, str]]) -> Table:
    """For a terminal."""
    table = Table()
    table.add_column("held out")
    table.add_column("pretrained", justify="right")
    table.add_column("fine-tuned", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(rows: list[tuple[str, str, str]]) -> str:
    """For a README."""
    lines = ["| held out | pretrained | fine-tuned |", "|---|---:|---:|"]
    lines += [f"| {name.strip()} | {before} | {after} |" for name, before, after in rows]
    return "\n".join(lines) + "\n"

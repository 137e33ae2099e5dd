"""``python -m benchmarks COMMAND``; each command's module says what it does."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import gpu, loss, model, plot, record, report, scale, static, tables, train

COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "loss": (loss.Config, loss.main),
    "train": (train.Config, train.main),
    "scale": (scale.Config, scale.main),
    "record": (record.Config, record.main),
    "static": (static.Config, static.main),
    "model": (model.Config, model.main),
    "gpu": (gpu.Config, gpu.main),
    "plot": (plot.Config, plot.main),
    "report": (report.Config, report.main),
    "tables": (tables.Config, tables.main),
}


def main() -> None:
    """Runs one command."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"python -m benchmarks: expected one of {', '.join(COMMANDS)}")
    config_type, run = COMMANDS[sys.argv[1]]
    run(tyro.cli(config_type, args=sys.argv[2:], prog=f"python -m benchmarks {sys.argv[1]}"))


if __name__ == "__main__":
    main()

"""The ``bft`` command: ``train``, ``eval``, ``data``, ``demo`` and ``info``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bft.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    InfoConfig,
    TrainConfig,
    yaml_flags,
)
from bft_kernels import info

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for name in ("httpx", "matplotlib", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return _usage(arguments)
    name, flags = arguments[0], arguments[1:]
    config_type, run = COMMANDS[name]
    try:
        config: Any = tyro.cli(config_type, args=_with_config_file(flags), prog=f"bft {name}")
        run(config)
    except KeyboardInterrupt:
        print(f"bft {name}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not _says_it_all(error):
            raise
        print(f"bft {name}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    return 0


def _says_it_all(error: Exception) -> bool:
    """Whether an error's message is for the user: a missing file, or one of our own checks.

    What a library raises from its depths is a fault to be found, with its traceback.
    """
    if isinstance(error, FileNotFoundError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    ours = raised_in.partition(".")[0] in ("bft", "bft_kernels")
    return ours and isinstance(error, ValueError | TypeError | RuntimeError)


# Functions import what they need: `bft info` has to work where transformers does not.


def _train(config: TrainConfig) -> None:
    from bft.train import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"model   {result.model_dir}")


def _demo(config: DemoConfig) -> None:
    from bft.demo import demo

    demo(config)


def _data(config: DataConfig) -> None:
    from bft import hpo

    hpo.main(config.output_dir, seed=config.seed)


def _usage(arguments: Sequence[str]) -> int:
    text = """usage: bft COMMAND [--config FILE.yaml] [flags]

  demo    fine-tune a small model on biomedical questions and measure what that bought
  train   fine-tune a Hugging Face causal LM with BFT, DFT or SFT
  eval    evaluate a model on held-out records
  data    build the demo's question set
  info    versions, devices, backends, and why a backend does not run

bft COMMAND --help lists a command's flags; a YAML file holds the same names."""
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"bft: got {arguments[0]!r}, expected a command\n\n{text}", file=sys.stderr)
        return 2
    print(text)
    return 0 if arguments else 2


def _with_config_file(flags: Sequence[str]) -> list[str]:
    """``--config FILE`` becomes the flags it holds, in front, so that flags override the file."""
    flags = list(flags)
    for place, flag in enumerate(flags):
        if flag == "--config" or flag.startswith("--config="):
            path = flag.partition("=")[2] or (flags[place + 1] if place + 1 < len(flags) else "")
            if not path:
                raise ValueError("--config: got nothing, expected a YAML file")
            rest = flags[:place] + flags[place + (1 if "=" in flag else 2) :]
            return [*yaml_flags(Path(path)), *rest]
    return flags


def _evaluate(config: EvalConfig) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bft.data import read_jsonl
    from bft.evaluate import evaluate
    from bft.metrics import to_json
    from bft.pretrained import pretrained

    folder = str(pretrained(config.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to(device)
    result = evaluate(
        model,
        AutoTokenizer.from_pretrained(folder),
        read_jsonl(config.file, limit=config.limit),
        train=config.train_file,
        max_length=config.max_length,
    ).to_dict()
    table = Table(title=f"{config.model} on {config.file}")
    table.add_column("held out")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, int | float | str):
            table.add_row(name, format(value, ".4f") if isinstance(value, float) else str(value))
    Console().print(table)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(to_json(result, indent=2), encoding="utf-8")


def _info(config: InfoConfig) -> None:
    facts = info()
    if config.json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title="bft-kernels")
    for column in ("what", "name", "value"):
        table.add_column(column)
    for part in ("versions", "devices", "extensions"):
        for name, value in facts[part].items():
            table.add_row(part, name, str(value))
    for name, devices in facts["backends"].items():
        for device, reasons in devices.items():
            table.add_row("backends", name, f"{device}: {'; '.join(reasons) or 'runs'}")
    Console().print(table)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, _demo),
    "train": (TrainConfig, _train),
    "eval": (EvalConfig, _evaluate),
    "data": (DataConfig, _data),
    "info": (InfoConfig, _info),
}


if __name__ == "__main__":
    sys.exit(main())

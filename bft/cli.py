"""The ``bft`` command: each of its commands, exit statuses, and errors on one line."""

import dis
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bft.config import (
    CheckConfig,
    CompareConfig,
    DataConfig,
    DemoConfig,
    EvalConfig,
    InfoConfig,
    ScoreConfig,
    TrainConfig,
)
from bft.usage import in_flags, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status (see `_usage`)."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for name in ("absl", "accelerate", "datasets", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        import torch

        from bft_kernels import __version__

        print(f"bft-kernels {__version__}, torch {torch.__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        return _usage(arguments)
    if "" not in sys.path:  # the current folder, as with `python -m bft`: --scheme may look there
        sys.path.append("")
    name, flags = arguments[0], arguments[1:]
    config_type, run = COMMANDS[name]
    try:
        return run(parse(config_type, flags, prog=f"bft {name}")) or 0
    except KeyboardInterrupt:
        print(f"bft {name}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if (message := _for_the_user(error)) is None:
            raise
        print(f"bft {name}: {in_flags(message, config_type)}", file=sys.stderr)
        return int(getattr(error, "exit_status", 1))


def _for_the_user(error: Exception) -> str | None:
    """What to tell the user: what the system refused, and what a `raise` of ours says.

    Whatever else arises, in a library or by itself in our code, is a fault: None, for a traceback.
    """
    if isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror}"
    if type(error).__name__ == "SafetensorError" and "(os error" in str(error):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, ValueError | TypeError | RuntimeError):
        return None
    ours = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("bft", "bft_kernels")
    raised = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return str(error) if ours and raised else None


# Functions import what they need: `bft info` has to work where transformers does not, and torch
# takes a second that --help does without.


def _train(config: TrainConfig) -> None:
    from bft.train import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0":
        if len(result.evaluations) > 1:
            before, after = (result.evaluations[place]["nll"] for place in (0, -1))
            print(f"nll     {before:.3f} before, {after:.3f} after {result.steps} steps (held out)")
        if result.model_dir is not None:
            print(f"model   {result.model_dir}")


def _compare(config: CompareConfig) -> None:
    from bft.study.compare import compare

    compare(config)


def _check(config: CheckConfig) -> int:
    from bft.check import check

    return int(any(finding.verdict == "WRONG" for finding in check(config)))


def _demo(config: DemoConfig) -> None:
    from bft.demo.run import demo

    demo(config)


def _data(config: DataConfig) -> None:
    from bft.tasks import hpo, hub, task

    if not config.task:
        hpo.main(config.output_dir or Path("data/hpo"), seed=config.seed)
        return
    if config.task == "hub":
        found, name = hub.task(config.name, config.source), config.name
    else:
        found, name = task.find(config.task), config.task.rpartition(":")[2]
    task.main(found, config.output_dir or Path("data") / name, seed=config.seed)


def _usage(arguments: Sequence[str]) -> int:
    listed = "\n".join(f"  {name:8}{config.__doc__}" for name, (config, _) in COMMANDS.items())
    text = f"""usage: bft COMMAND [--config FILE.yaml] [flags]

{listed}

bft COMMAND --help lists a command's flags; a YAML file holds the same names.
bft --version names the versions of bft-kernels and torch.

exit status: 0 if all went well; 1 if the run failed, or bft check found something wrong;
2 if a flag, the YAML file or the output folder is wrong or in use; 130, 143 after a signal"""
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"bft: got {arguments[0]!r}, expected a command\n\n{text}", file=sys.stderr)
        return 2
    print(text)
    return 0 if arguments else 2


def _evaluate(config: EvalConfig) -> None:
    import torch

    from bft.evaluate import evaluate
    from bft.load import load_pretrained
    from bft.metrics import write_json
    from bft.nonfinite import NonFinite
    from bft.records import read_jsonl

    records = read_jsonl(config.file, limit=config.limit)
    model, tokenizer = load_pretrained(config.model, "auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(
        model,
        tokenizer,
        records,
        train=None if config.train_file is None else read_jsonl(config.train_file),
        max_length=config.max_length,
    ).to_dict()
    value_column = Column("value", justify="right")
    table = Table("held out", value_column, title=f"{config.model} on {config.file}")
    for name, value in result.items():
        if isinstance(value, int | float | str):
            table.add_row(name, format(value, ".4f") if isinstance(value, float) else str(value))
    Console().print(table)
    if config.output is not None:
        write_json(config.output, result)
    if not math.isfinite(result["nll"]):
        raise NonFinite(f"nll is {result['nll']}: {config.model} is broken")


def _score(config: ScoreConfig) -> None:
    from bft.score import score

    score(config)


def _info(config: InfoConfig) -> None:
    from bft_kernels import info

    facts = info()
    if config.json:
        print(json.dumps(facts, indent=2))
        return
    table = Table("what", "name", "value", title="bft-kernels")
    for part in ("versions", "devices", "extensions"):
        for name, value in facts[part].items():
            table.add_row(part, name, str(value))
    for name, devices in facts["backends"].items():
        for device, reasons in devices.items():
            table.add_row("backends", name, f"{device}: {'; '.join(reasons) or 'runs'}")
    Console().print(table)


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "demo": (DemoConfig, _demo),
    "train": (TrainConfig, _train),
    "compare": (CompareConfig, _compare),
    "eval": (EvalConfig, _evaluate),
    "score": (ScoreConfig, _score),
    "check": (CheckConfig, _check),
    "data": (DataConfig, _data),
    "info": (InfoConfig, _info),
}

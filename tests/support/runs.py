"""What tests of runs ask of a run's folder, and how they start one on two processes."""

import json
import sys
from dataclasses import replace


def unevaluated(config, **changed):
    """A configuration whose run evaluates nothing."""
    return replace(config, eval_file=None, eval_limit=None, **changed)


def checkpoints(output_dir):
    """Names of a run's checkpoints."""
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def strict_json(text):
    """JSON without the words that are not JSON."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def metrics(output_dir, kind=None):
    """The rows of metrics.jsonl."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [strict_json(line) for line in lines]
    return [row for row in rows if kind in (None, row["kind"])]


def on_two_processes(*arguments):
    """The command that trains as torchrun does; ``arguments`` go to ``bft train``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return [*launcher, "-m", "bft", "train", *map(str, arguments)]

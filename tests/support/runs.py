"""What tests of runs ask of a run's folder, and how they start one on two processes."""

import json
import resource
import sys
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors.torch import load_file


def unevaluated(config, **changed):
    """A configuration whose run evaluates nothing."""
    return replace(config, eval_file=None, eval_limit=None, **changed)


def checkpoints(output_dir):
    """Names of a run's checkpoints."""
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def assert_same_weights(folder, other):
    """Two models, or two adapters, are the same to the last bit."""
    pair = [load_file(next(place.glob("*.safetensors"))) for place in (folder, other)]
    torch.testing.assert_close(*pair, rtol=0, atol=0)


@contextmanager
def files_up_to(size):
    """The system writes no file of more bytes, as if its disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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

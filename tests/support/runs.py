"""What tests of runs ask of a run's folder, and how they start one on two processes."""

import json
import os
import resource
import subprocess
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
    return sorted(path.name for path in (output_dir / "checkpoints").glob("*"))


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


def run_python(*arguments, status=0, **environment):
    """Runs an interpreter of its own, with these environment variables beside the others."""
    command = [sys.executable, *map(str, arguments)]
    options = {"env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def one_step(folder):
    """Arguments of transformers' trainers, on the CPU: one step, and nothing saved or shown."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(folder), "use_cpu": True, "max_steps": 1, **quiet}


def on_two_processes(*arguments):
    """Python's arguments to train as torchrun does; ``arguments`` go to ``bft train``."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return [*launcher, "-m", "bft", "train", *arguments]

"""What makes two starts one run: every setting that its numbers depend on, its data and its model.

A checkpoint holds it, and ``--resume`` compares. Otherwise another learning rate, say, would be
written down and not be used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from bft.config import TrainConfig, plain
from bft.encode import Example
from bft.head import causal_lm

# Where a run reads and writes, what it reports and how it computes: none of it changes a number.
_WHERE = ("output_dir", "resume", "overwrite", "tensorboard", "trackers", "histogram_every")
_REPORTS = ("eval_file", "eval_every", "eval_first", "eval_limit")
_WRITES = ("save_every", "keep_checkpoints", "save_model")
_HOW = ("backend", "max_buffer_mib", "gradient_checkpointing", "on_nonfinite")
# These are compared as what they are, not as how they were given: examples, contents, steps.
_KNOWN_OTHERWISE = ("train_file", "model", "epochs", "steps")
MAY_CHANGE = frozenset((*_WHERE, *_REPORTS, *_WRITES, *_HOW, *_KNOWN_OTHERWISE))
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def identity(
    config: TrainConfig, steps: int, processes: int, examples: Iterable[Example], model: nn.Module
) -> dict[str, Any]:
    """What a checkpoint of this run holds to be known by, ready for JSON.

    ``model`` is the one to train before its first step, with adapters or without.
    """
    settings = {name: value for name, value in plain(config).items() if name not in MAY_CHANGE}
    return {
        **settings,
        "steps": steps,
        "processes": processes,
        "train_file (as encoded by the tokenizer and its chat template)": digest_examples(examples),
        "model (contents)": digest_model(model),
    }


def differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One phrase for each name whose values differ. A newer setting had its default."""
    return [
        f"{name}: saved {json.dumps(old)}, given {json.dumps(new)}"
        for name, new in given.items()
        if (old := saved.get(name, _DEFAULTS.get(name))) != new
    ]


def digest_examples(examples: Iterable[Example]) -> str:
    """A digest of the tokens, labels and weights that are trained on, wherever their file is."""
    digest = hashlib.sha256()
    for example in examples:
        weights = () if example.weights is None else (example.weights,)
        digest.update(json.dumps([example.input_ids, example.labels, *weights]).encode())
    return digest.hexdigest()[:16]


def digest_model(model: nn.Module) -> str:
    """A digest of the base model's configuration and of 64 values of each of its parameters."""
    inner = causal_lm(model)
    settings = inner.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in inner.named_parameters():
        if "lora_" not in name:
            name = name.replace(".base_layer", "")
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            values = parameter.detach().flatten()
            count = min(64, len(values))
            places = [place * (len(values) - 1) // max(1, count - 1) for place in range(count)]
            digest.update(values[places].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

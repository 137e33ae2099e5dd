"""A model and its tokenizer, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft.demo.pretrained import PretrainedError, first_line, pretrained


def load_pretrained(name_or_path: str | Path, dtype: Any) -> tuple[Any, Any]:
    """The causal LM that :func:`pretrained` finds, and its tokenizer.

    Raises what :func:`pretrained` raises, and PretrainedError where transformers cannot load it.
    """
    folder = str(pretrained(name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise PretrainedError(
            f"model: transformers cannot load {folder} ({first_line(error)}); expected a causal "
            "language model with its weights, configuration and tokenizer"
        ) from error
    model, loaded = both
    # transformers warns, and goes on with random numbers in their place.
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise PretrainedError(
            f"model: {folder} holds no weights for {len(missing)} parameters ({missing[0]}, ...), "
            "expected all of them"
        )
    broken = _not_finite(model)
    if broken is not None:
        raise PretrainedError(
            f"model: {folder} holds an infinity or NaN in {broken}, expected finite weights"
        )
    # transformers makes an empty one where there is none.
    files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if files and os.path.isdir(folder) and not files.intersection(os.listdir(folder)):
        raise PretrainedError(
            f"model: {folder} holds no tokenizer, expected one of {', '.join(sorted(files))}"
        )
    return model, tokenizer


def _not_finite(model: nn.Module) -> str | None:
    """The first parameter that holds an infinity or NaN; types of 8 bits and fewer have neither."""
    for name, parameter in model.named_parameters():
        wide = parameter.is_floating_point() and parameter.element_size() > 1
        if wide and not bool(torch.isfinite(parameter.detach()).all()):
            return name
    return None

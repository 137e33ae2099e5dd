"""A model and its tokenizer, by name; with LoRA adapters where a run asks for them."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from bft.config import SettingError, TrainConfig
from bft.demo.pretrained import SOURCES, converted
from bft.metrics import first_line
from bft.nonfinite import first_broken
from bft.packaged import PretrainedError, cache_root

logger = logging.getLogger(__name__)

EVERYWHERE = ("all-linear",)


def pretrained(name_or_path: str | Path) -> Path:
    """The folder of a loadable checkpoint (safetensors, tokenizer, chat template), or a hub id.

    A built-in name (see `SOURCES`) is converted into the cache on its first use. Where the hub does
    not answer for its id ("owner/name"), the folder of an earlier download is returned.

    Raises:
        PretrainedError: a package is missing, a conversion not faithful, or the hub out of reach.
        SettingError: the name is unknown.
    """
    name = str(name_or_path)
    if name in SOURCES:
        return converted(name, cache_root())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        adapter = (path / "adapter_config.json").is_file()
        whole = path / "model" if (path / "model").is_dir() else path.parent if adapter else None
        hint = f"; the model of that run is {whole}" if whole else ""
        wanted = "a checkpoint folder with a config.json"
        raise SettingError(f"model: expected {wanted}, got {path}{hint}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _on_hub(name)
    raise SettingError(f"model: expected {_NAMES}, got {name!r}")


_NAMES = f"one of {sorted(SOURCES)}, a checkpoint folder or a hub id"


def _on_hub(name: str) -> Path:
    """The hub id, or an earlier download's folder; asks once, transformers would for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    cause: Exception
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return Path(name)
    except RepositoryNotFoundError as error:
        login = "misspelt, or only for users who are logged in: `hf auth login`"
        cause, why = error, f"the hub shows no {name!r} ({login})"
    except Exception as error:  # whichever HTTP library the hub's client is built on
        downloaded = try_to_load_from_cache(name, "config.json")
        if isinstance(downloaded, str):
            logger.warning("%s: the hub does not answer, so an earlier download is used", name)
            return Path(downloaded).parent
        cause, why = error, f"the hub does not answer for {name!r} ({first_line(error)})"
    raise PretrainedError(
        f"model: {why}, and there is no such folder; expected {_NAMES}"
    ) from cause


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
    # transformers goes on with random numbers for missing weights, and an empty tokenizer.
    missing = sorted(loaded["missing_keys"])
    files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    # Types of 8 bits and fewer have no infinity and no NaN.
    wide = [(k, p) for k, p in model.named_parameters() if p.dtype.itemsize > 1]
    wrong = None
    if missing:
        wrong = f"no weights for {len(missing)} parameters ({missing[0]}, ...), expected all"
    elif place := first_broken([p for _, p in wide]):
        wrong = f"an infinity or NaN in {wide[place - 1][0]}, expected finite weights"
    elif files and os.path.isdir(folder) and not files.intersection(os.listdir(folder)):
        wrong = f"no tokenizer, expected one of {', '.join(sorted(files))}"
    if wrong is not None:
        raise PretrainedError(f"model: {folder} holds {wrong}")
    return model, tokenizer


def load_model(config: TrainConfig) -> tuple[Any, Any]:
    """The model to train, with adapters and checkpointing as configured, and its tokenizer."""
    model, tokenizer = load_pretrained(config.model, getattr(torch, config.dtype))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora_rank > 0:
        model = add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    return model, tokenizer


def add_adapters(
    model: Any, rank: int, alpha: float | None = None, targets: tuple[str, ...] = EVERYWHERE
) -> Any:
    """The model with adapters of this rank, and LoRA's scale ``alpha``; the rest is frozen.

    Raises:
        SettingError: a target is no module, or of a kind that PEFT has no adapter for.
    """
    from peft import LoraConfig, get_peft_model

    if targets != EVERYWHERE:
        others = tuple(target for target in targets if target not in EVERYWHERE)
        _check_targets(model, others)
        if others != targets:  # PEFT takes the word alone
            targets = (*_linear_layers(model), *others)
    scale: Any = 2 * rank if alpha is None else alpha
    lora = LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules="all-linear" if targets == EVERYWHERE else list(targets),
        task_type="CAUSAL_LM",
    )
    model.enable_input_require_grads()
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # a module of a kind that PEFT has no adapter for
        raise SettingError(f"lora_targets: got {' '.join(targets)}: {error}") from error


def _linear_layers(model: Any) -> list[str]:
    """Paths of what PEFT calls all-linear: linear layers, but not the head."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return [p for p, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """PEFT takes a list as soon as one of its names is a module's, or the end of its path."""
    modules = dict(model.named_modules())
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in modules if path):
            layers = (nn.Linear, nn.Embedding, Conv1D)
            known = [p for p, m in modules.items() if isinstance(m, layers)]
            ends = sorted({path.rpartition(".")[2] for path in known})
            raise SettingError(
                f"lora_targets: got {target!r}, which is no module of {type(model).__name__}; "
                f"expected some of all-linear, {', '.join(ends)}"
            )

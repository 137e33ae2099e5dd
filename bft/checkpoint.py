"""Checkpoints: resumable ones while a run lasts, a plain Hugging Face folder at its end.

A folder gets its final name when it is complete. A resumable one is read only if it is as it was
written, and only by the run that wrote it.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import load
from safetensors import SafetensorError
from torch import Tensor, nn

from bft.manifest import read_manifest, write_manifest
from bft.metrics import first_line
from bft.ranks import on_main
from bft.same_run import differences

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# A checkpoint, or what a run that died left of one.
STEP_FOLDER = re.compile(r"step-(\d+)|\.step-\d+\.(partial|previous)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be resumed from: why, and the way out."""


class AnotherRun(CheckpointError):
    """The checkpoint is of a run with other settings, records or model."""

    exit_status = 2  # it is the flags that are wrong


class WriteError(RuntimeError):
    """A checkpoint or model that could not be written, as on a full disk."""


@contextmanager
def _appearing(folder: Path, accelerator: Any) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends without an error."""
    scratch = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def publish() -> None:
        previous = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(scratch, folder)
        shutil.rmtree(previous, ignore_errors=True)

    try:
        on_main(accelerator, begin)
        yield scratch
        accelerator.wait_for_everyone()
        on_main(accelerator, publish)
    except BaseException as error:  # what is not whole must not fill the disk
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
        # safetensors and torch.save have their own errors for a full disk.
        refused = isinstance(error, OSError | SafetensorError | RuntimeError)
        if refused and not isinstance(error, WriteError):
            raise WriteError(f"{folder} could not be written: {first_line(error)}") from error
        raise


def save_progress(
    accelerator: Any, output_dir: Path, step: int, keep: int, identity: dict[str, Any]
) -> Path:
    """Saves model, optimizer, schedule and random states after ``step`` steps.

    ``identity`` is what :func:`load_progress` knows the run by. The ``keep`` newest checkpoints up
    to this one are kept. Raises WriteError.
    """
    folder = output_dir / CHECKPOINTS / f"step-{step:07d}"

    def complete(scratch: Path) -> None:
        ranks = [f"random_states_{rank}.pkl" for rank in range(accelerator.num_processes)]
        gone = [name for name in ("*model*", *ranks) if not any(scratch.glob(name))]
        if gone:
            raise WriteError(f"{folder}: {gone[0]} is gone from it; does another run write there?")
        write_manifest(scratch, step, identity)

    with _appearing(folder, accelerator) as scratch:
        accelerator.save_state(str(scratch))
        accelerator.wait_for_everyone()
        on_main(accelerator, lambda: complete(scratch))
    if accelerator.is_main_process:
        older = [path for path in checkpoint_folders(output_dir) if _step(path) <= step]
        for old in older[:-keep]:
            shutil.rmtree(old)
        for left in folder.parent.glob(".step-*"):  # by a run that died while it saved
            shutil.rmtree(left, ignore_errors=True)
    return folder


def load_progress(accelerator: Any, output_dir: Path, identity: dict[str, Any]) -> int:
    """Restores the newest checkpoint of the run; returns its step, 0 if there is none.

    Raises:
        AnotherRun: it is of a run with another ``identity``.
        CheckpointError: it is damaged, or the random states of this rank are not restored.
    """
    folder = on_main(accelerator, lambda: _resumable(output_dir, identity))
    if folder is None:
        return 0
    try:
        accelerator.load_state(str(folder))
    except Exception as error:
        # Every file is as it was written, so this is another model or another library's format.
        raise CheckpointError(
            f"{folder}: {type(error).__name__}: {first_line(error)}; it was saved by another "
            "model or by another version of torch, accelerate or peft"
        ) from error
    _check_random_states(accelerator, folder)
    return _step(folder)


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The resumable checkpoints of a folder, whole or damaged, by falling age."""
    found = []
    for path in (output_dir / CHECKPOINTS).glob("step-*"):
        if STEP_FOLDER.fullmatch(path.name) and path.is_dir():
            found.append(path)
        else:
            logger.warning("%s is no checkpoint, and is left alone", path)
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _resumable(output_dir: Path, identity: dict[str, Any]) -> Path | None:
    """The newest checkpoint, if it is whole and of this run."""
    found = checkpoint_folders(output_dir)
    if not found:
        return None
    facts, damage = _inspect(found[-1])
    if damage is not None:
        whole = [place for place, path in enumerate(found) if _inspect(path)[1] is None]
        newer = ", ".join(path.name for path in found[whole[-1] + 1 if whole else 0 :])
        then = f"resume from {found[whole[-1]].name}" if whole else "start anew without --resume"
        raise CheckpointError(f"{found[-1]} is damaged: {damage}; remove {newer} to {then}")
    if different := differences(facts["identity"], identity):
        raise AnotherRun(
            f"{found[-1]} is of a run with other settings: {'; '.join(different)}. Resume with the "
            "saved ones, or start a new run in another folder or with --overwrite"
        )
    return found[-1]


def _inspect(folder: Path) -> tuple[dict[str, Any], str | None]:
    facts, damage = read_manifest(folder)
    if damage is None and facts.get("step") != _step(folder):
        damage = f"its manifest is of step {facts.get('step')}"
    return facts, damage


def _check_random_states(accelerator: Any, folder: Path) -> None:
    """Accelerate goes on without the random states that it cannot restore."""
    path = folder / f"random_states_{accelerator.process_index}.pkl"
    if not path.exists():
        processes = "resume with the number of processes of the saved run"
        raise CheckpointError(f"{path} is missing: {processes}")
    states = load(path)  # no pickled code
    if not torch.equal(torch.get_rng_state(), states["torch_manual_seed"]):
        raise CheckpointError(f"{path}: torch's random state was not restored from it")
    if torch.cuda.is_available():
        saved = states.get("torch_cuda_manual_seed", [])
        now = torch.cuda.get_rng_state_all()
        if len(saved) != len(now) or not all(map(torch.equal, saved, now)):
            logger.warning(
                "%s was saved with other GPUs: dropout draws anew from here on", folder.name
            )


def save_model(accelerator: Any, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes safetensors, configuration and tokenizer, as ``from_pretrained`` loads them.

    A LoRA model is written merged into its base, and its adapter alone in ``adapter``. The model
    stays as it is, so that the run can still be saved where this raises WriteError.
    """
    state = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)

    def write(scratch: Path) -> None:
        if hasattr(plain, "get_base_model"):
            plain.save_pretrained(scratch / "adapter", state_dict=state)
            _save_merged(plain, state, scratch)
        else:
            plain.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)

    with _appearing(folder, accelerator) as scratch:
        on_main(accelerator, lambda: write(scratch))


def save_adapter(accelerator: Any, model: nn.Module, folder: Path) -> None:
    """Writes what a LoRA model has learned, and nothing of its base. Raises WriteError."""
    state = accelerator.get_state_dict(model)
    with _appearing(folder, accelerator) as scratch:
        plain = accelerator.unwrap_model(model)
        on_main(accelerator, lambda: plain.save_pretrained(scratch, state_dict=state))


def _save_merged(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Writes the base of a PEFT model with its adapters added to its weights.

    Where an adapter is on one of a tied embedding and head, or each has its own, the two are
    written as two tensors: they have not learned the same.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers: Any = [(name, m) for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    merged = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }
    for name, layer in layers:
        weight = merged[f"{name}.weight"]
        for adapter in layer.active_adapters:
            weight = (weight + layer.get_delta_weight(adapter).to(weight.device)).to(weight.dtype)
        merged[f"{name}.weight"] = weight.cpu()
    outer = base.get_output_embeddings()
    head = getattr(outer, "weight", None)
    split = any(layer.get_base_layer().weight is head for _, layer in layers)
    configs = [base.config, base.config.get_text_config()]
    tied = [c for c in configs if split and getattr(c, "tie_word_embeddings", False)]
    if tied:
        logger.warning(
            "embedding and head are tied, and what adapters changed in one of them is not in the "
            "other: they are written as two, with tie_word_embeddings=false. Merge the adapter "
            "only into such a base"
        )
        for bias in (f"{name}.bias" for name, module in base.named_modules() if module is outer):
            if bias in merged:  # BERT ties it, too, and safetensors would hold it once
                merged[bias] = merged[bias].clone()
    try:
        for config in tied:
            config.tie_word_embeddings = False
        base.save_pretrained(folder, state_dict=merged)
    finally:
        for config in tied:
            config.tie_word_embeddings = True

"""Checkpoints: resumable ones while a run lasts, a plain Hugging Face folder at its end.

A folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_STEP = re.compile(r"step-(\d+)")
_PROGRESS = "progress.json"


@contextmanager
def _appearing(folder: Path, accelerator: Any) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends without an error."""
    scratch = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield scratch
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        previous = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(scratch, folder)
        shutil.rmtree(previous, ignore_errors=True)
    accelerator.wait_for_everyone()


def save_progress(accelerator: Any, output_dir: Path, step: int, keep: int) -> Path:
    """Saves model, optimizer, schedule and random states after ``step`` steps.

    Keeps the ``keep`` newest checkpoints of the run.
    """
    folder = output_dir / "checkpoints" / f"step-{step:07d}"
    with _appearing(folder, accelerator) as scratch:
        accelerator.save_state(str(scratch))
        if accelerator.is_main_process:
            (scratch / _PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")
    if accelerator.is_main_process:
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return folder


def load_progress(accelerator: Any, output_dir: Path) -> int:
    """Restores the newest checkpoint of the run; returns its step, 0 if there is none."""
    found = _checkpoints(output_dir)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    step: int = json.loads((found[-1] / _PROGRESS).read_text(encoding="utf-8"))["step"]
    return step


def _checkpoints(output_dir: Path) -> list[Path]:
    folder = output_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found)


def save_model(accelerator: Any, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes safetensors, configuration and tokenizer, as ``from_pretrained`` loads them.

    A LoRA model is written twice: merged into its base here, and its adapter alone in ``adapter``.
    """
    state = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    with _appearing(folder, accelerator) as scratch:
        if not accelerator.is_main_process:
            return
        if hasattr(plain, "merge_and_unload"):
            plain.save_pretrained(scratch / "adapter", state_dict=state)
            plain = plain.merge_and_unload()
            state = plain.state_dict()
        plain.save_pretrained(scratch, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(scratch)

"""Whether the disk has room for what a run will write, asked before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from torch import nn

from bft.checkpoint import checkpoint_folders
from bft.config import SettingError, TrainConfig
from bft.ranks import on_main
from bft.run import Run
from bft.run_folder import bytes_of_old_run

_MIB = 2**20


def check_room(run: Run, first: int) -> None:
    """Raises SettingError if the model and checkpoints of the steps after ``first`` do not fit."""
    on_main(run.accelerator, lambda: _check(run, first))


def _check(run: Run, first: int) -> None:
    config = run.config
    model, checkpoint = model_bytes(run.model), checkpoint_bytes(run.model)
    needed = _needed(config, first, run.steps, model, checkpoint)
    disk = shutil.disk_usage(config.output_dir)
    free = disk.free + (bytes_of_old_run(config.output_dir) if config.overwrite else 0)
    if free >= needed or disk.total == 0:  # some network file systems do not tell
        return
    what = f"the model, {model / _MIB:,.1f} MiB"
    way_out = "make room, or give a folder on another disk"
    if config.save_every is not None:
        what += f", and checkpoints of {checkpoint / _MIB:,.1f} MiB each"
        way_out += ", a lower keep_checkpoints, or no save_every"
    raise SettingError(
        f"output_dir: {config.output_dir} has {free / _MIB:,.1f} MiB free, and the run needs "
        f"{needed / _MIB:,.1f} MiB ({what}); {way_out}"
    )


def model_bytes(model: nn.Module) -> int:
    """What the written model takes, tied parameters once; with LoRA the base and the adapter."""
    return _bytes(model.parameters())


def checkpoint_bytes(model: nn.Module) -> int:
    """What a resumable checkpoint takes: the model, and AdamW's two moments of what is trained."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return model_bytes(model) + 2 * _bytes(trained)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _needed(config: TrainConfig, first: int, steps: int, model: int, checkpoint: int) -> int:
    """The most that is written beside what is there: old files go when new ones are whole."""
    every, keep = config.save_every, config.keep_checkpoints
    if every is None or first == steps:
        return model
    there = len(checkpoint_folders(config.output_dir)) if config.resume else 0
    saves = -(-steps // every) - first // every
    while_saving = min(there + saves, keep + 1) - there
    at_the_end = min(there + saves, keep) - there
    return max(while_saving * checkpoint, at_the_end * checkpoint + model)

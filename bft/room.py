"""Room on the disk for what a run will write: asked for, and set aside, before its first step."""

import errno
import logging
import os
import shutil
from pathlib import Path

from bft.checkpoint import checkpoint_folders
from bft.config import SettingError
from bft.ranks import on_main
from bft.run import Run
from bft.run_folder import ROOM, bytes_of_old_run

logger = logging.getLogger(__name__)

_MIB = 2**20
_SMALL_FILES = 2**16  # configuration, random states, manifest
_PER_TENSOR = 2**12  # of a parameter's name and padding in the files of model and optimizer


def check_room(run: Run, first: int) -> None:
    """Raises SettingError if the model and checkpoints of the steps after ``first`` do not fit."""
    on_main(run.accelerator, lambda: _check(run, first))


def _check(run: Run, first: int) -> None:
    config = run.config
    model, checkpoint = _sizes(run)
    needed = model
    if config.save_every is not None and first < run.steps:
        # Old files go when new ones are whole.
        there = len(checkpoint_folders(config.output_dir)) if config.resume else 0
        saves = -(-run.steps // config.save_every) - first // config.save_every
        while_saving = min(there + saves, config.keep_checkpoints + 1) - there
        at_the_end = min(there + saves, config.keep_checkpoints) - there
        needed = max(while_saving * checkpoint, at_the_end * checkpoint + model)
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


def set_aside(run: Run, first: int) -> None:
    """Takes the room for what is written next, so that no other program can until then.

    That is the first checkpoint, or the model: with either, nothing that was trained is lost.
    """
    size, checkpoint = _sizes(run)
    if run.config.save_every is not None and first < run.steps:
        tensors = len(list(run.model.parameters()))
        size = max(size, checkpoint + tensors * _PER_TENSOR + _SMALL_FILES)
    on_main(run.accelerator, lambda: _allocate(run.config.output_dir / ROOM, size))


def _allocate(path: Path, size: int) -> None:
    allocate = getattr(os, "posix_fallocate", None)  # macOS has none
    try:
        if allocate is None:
            raise OSError(errno.EOPNOTSUPP, "posix_fallocate is missing")
        with path.open("wb") as file:
            allocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SettingError(
                f"output_dir: {path.parent} has no room for what the run writes first, "
                f"{size / _MIB:,.1f} MiB ({error.strerror}); make room, or give another folder"
            ) from None
        logger.warning(
            "%s: no room can be set aside there (%s): the model is lost if others fill the disk",
            path.parent,
            error.strerror,
        )


def _sizes(run: Run) -> tuple[int, int]:
    """Bytes of the written model with its tokenizer, and of a resumable checkpoint.

    That has AdamW's two moments of what is trained. With LoRA both have the base and the adapter.
    """
    weights = moments = 0
    for parameter in run.model.parameters():  # tied ones once
        weights += parameter.nbytes
        moments += 2 * parameter.nbytes * parameter.requires_grad
    tokenizer = getattr(run.tokenizer, "backend_tokenizer", None)  # slow ones are small
    text = len(tokenizer.to_str()) if tokenizer is not None else 0
    return weights + text + _SMALL_FILES, weights + moments

"""The output folder of a run: it belongs to one run, has room for it, and holds no older one.

The lock is the operating system's, on an open file: it ends with its process.
"""

import dataclasses
import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bft.checkpoint import CHECKPOINTS, STEP_FOLDER, WriteError, checkpoint_folders
from bft.config import SettingError, TrainConfig
from bft.metrics import MetricLog, naming
from bft.ranks import largest, on_main
from bft.trackers import EVENTS, WANDB, start_trackers

if TYPE_CHECKING:
    from bft.run import Run

logger = logging.getLogger(__name__)

MODEL = "model"
ADAPTER = "rescued-adapter"  # where a full disk took nothing larger
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
LOCK = ".lock"
ROOM = ".room"  # set aside for what is written next
_MIB = 2**20
_SMALL_FILES = 2**16  # configuration, random states, manifest
_PER_TENSOR = 2**12  # of a parameter's name and padding in the files of model and optimizer


class FolderInUse(RuntimeError):
    """Another run holds the output folder."""

    exit_status = 2


@contextmanager
def claimed(accelerator: Any, config: TrainConfig) -> Iterator[None]:
    """Within it the run's output folder is there, and locked.

    Raises:
        FolderInUse: another run goes on in it.
        SettingError: it cannot be made; it holds an older run that is neither resumed nor replaced;
            or there is nothing to resume.
    """
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(locked(config.output_dir))
            give_room(config.output_dir)  # left by a run that was killed
            if config.resume:
                _check_resumable(config.output_dir)
            else:
                _check_free(config)

        on_main(accelerator, claim)
        try:
            yield
        finally:
            if accelerator.is_main_process:
                give_room(config.output_dir)


def start_log(accelerator: Any, config: TrainConfig, first: int) -> MetricLog:
    """Opens metrics.jsonl and the trackers and writes the configuration beside them."""
    if not config.resume:  # of a run that may be overwritten, or of a start that failed
        on_main(accelerator, lambda: remove_old_run(config.output_dir))
    log = MetricLog(
        config.output_dir / METRICS,
        enabled=accelerator.is_main_process,
        resumed_step=first,
        track=start_trackers(accelerator, config),
    )
    if accelerator.is_main_process:
        # How this start found its folder is no setting for another start with the same file.
        settings = dataclasses.replace(config, resume=False, overwrite=False)
        with naming(config.output_dir / CONFIG):
            (config.output_dir / CONFIG).write_text(settings.to_yaml(), encoding="utf-8")
    return log


def check_log(accelerator: Any, log: MetricLog, model_dir: Path | None) -> None:
    """Raises WriteError if the disk has not taken all lines."""
    if missing := largest(accelerator, len(log.waiting)):
        raise WriteError(
            f"{log.path} lacks its last {missing} lines, which the disk did not take"
            + (f"; {model_dir} is whole" if model_dir else "")
        )


def check_room(run: "Run", first: int) -> None:
    """Raises SettingError if the model and checkpoints of the steps after ``first`` do not fit."""
    on_main(run.accelerator, lambda: _check_disk(run, first))


def _check_disk(run: "Run", first: int) -> None:
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


def set_aside(run: "Run", first: int) -> None:
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


def _sizes(run: "Run") -> tuple[int, int]:
    """Bytes of the model with its tokenizer, if it is written, and of a resumable checkpoint.

    That has AdamW's two moments of what is trained. With LoRA both have the base and the adapter.
    """
    weights = moments = 0
    for parameter in run.model.parameters():  # tied ones once
        weights += parameter.nbytes
        moments += 2 * parameter.nbytes * parameter.requires_grad
    tokenizer = getattr(run.tokenizer, "backend_tokenizer", None)  # slow ones are small
    text = len(tokenizer.to_str()) if tokenizer is not None else 0
    model = weights + text if run.config.save_model else 0
    return model + _SMALL_FILES, weights + moments


def give_room(folder: Path) -> None:
    """Frees what was set aside, for what is written now."""
    (folder / ROOM).unlink(missing_ok=True)


def remove_old_run(folder: Path) -> None:
    """Removes what an older run wrote into the folder, and nothing else."""
    for path in _remains(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def bytes_of_old_run(folder: Path) -> int:
    """What :func:`remove_old_run` would free."""
    files = [path for remains in _remains(folder) for path in (remains, *remains.rglob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it the folder is there, and no other process has it.

    Raises:
        FolderInUse, SettingError: as :func:`claimed`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+b", buffering=0)  # what is not written is known at once
    except OSError as error:
        wanted = f"a folder to write in ({error.strerror})"
        raise SettingError(f"output_dir: got {folder}, expected {wanted}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
            raise FolderInUse(
                f"output_dir: {folder} is in use by {owner}; wait until that run ends, or give "
                "another folder"
            ) from None
        except OSError as error:
            why = f"its file system has no locks ({error.strerror})"
            logger.warning("%s: %s: do not start a second run in this folder", folder, why)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise SettingError(
                f"output_dir: {folder} cannot be written to ({error.strerror}); make room, or give "
                "another folder"
            ) from None
        yield


def _check_resumable(folder: Path) -> None:
    if not checkpoint_folders(folder):
        others = " and give --overwrite" if _remains(folder) else ""
        raise SettingError(
            f"resume: there is no checkpoint in {folder / CHECKPOINTS}; leave --resume out{others} "
            "to start at the first step"
        )


def _check_free(config: TrainConfig) -> None:
    folder, remains = config.output_dir, _remains(config.output_dir)
    names = [str(path.relative_to(folder)) for path in remains]
    log = folder / METRICS
    stepped = log.exists() and '"kind": "train"' in log.read_text(encoding="utf-8")
    if not stepped and set(names) <= {CONFIG, METRICS, EVENTS, WANDB}:
        return  # of a start that failed, or this start's own settings
    if MODEL in names and METRICS not in names:
        raise SettingError(
            f"output_dir: {folder / MODEL} is of no run: no {METRICS} is beside it; "
            "move it away, or give another folder"
        )
    if not config.overwrite:
        goes_on = "--resume goes on with it, " if checkpoint_folders(folder) else ""
        raise SettingError(
            f"output_dir: {folder} holds an older run ({', '.join(names)}); {goes_on}--overwrite "
            "removes it, or give another folder"
        )
    for name, used in (("model", Path(config.model)), ("train_file", config.train_file)):
        for path in remains:
            if used.exists() and used.resolve().is_relative_to(path.resolve()):
                raise SettingError(
                    f"{name}: {used} is part of the run in {folder} that --overwrite would remove; "
                    "give another output folder"
                )


def _remains(folder: Path) -> list[Path]:
    """The files and folders of a run that the folder holds, also unfinished ones."""
    steps = sorted((folder / CHECKPOINTS).glob("*"))
    found = [path for path in steps if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    whole = (MODEL, ADAPTER, METRICS, CONFIG, EVENTS, WANDB)
    cut_short = [f".{name}.partial" for name in (MODEL, ADAPTER, METRICS)] + [f".{MODEL}.previous"]
    return found + [path for name in (*whole, *cut_short) if (path := folder / name).exists()]

"""A run, and what it leaves in its folder: checkpoints on the way, the model at its end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from bft.checkpoint import WriteError, checkpoint_folders, save_adapter, save_model, save_progress
from bft.config import TrainConfig
from bft.data import AnswerDataset, StepBatches
from bft.loss import HeadLoss
from bft.nonfinite import NonFinite, broken_parameter
from bft.patch import unpatch_model
from bft.ranks import on_main
from bft.run_folder import ADAPTER, CONFIG, MODEL, give_room


@dataclass(frozen=True)
class Run:
    """What a run is made of, once it is ready for its first step."""

    config: TrainConfig
    accelerator: Accelerator
    model: Any
    tokenizer: Any
    loss: HeadLoss
    dataset: AnswerDataset
    batches: StepBatches
    collate: Callable[..., dict[str, Tensor]]
    optimizer: Any
    schedule: Any
    steps: int
    identity: dict[str, Any]  # what its checkpoints are known by


def save(run: Run, step: int) -> Path:
    """A checkpoint after ``step`` steps.

    Raises:
        NonFinite: the model is broken.
        WriteError: the checkpoint could not be written; the message names the last one.
    """
    config, accelerator = run.config, run.accelerator
    _before_writing(run)
    try:
        return save_progress(
            accelerator, config.output_dir, step, config.keep_checkpoints, run.identity
        )
    except WriteError as error:
        found = checkpoint_folders(config.output_dir)
        way_out = f"--resume goes on from {found[-1]}" if found else "there is no older one"
        raise WriteError(f"{error}; {way_out}") from error


def write_model(run: Run) -> Path:
    """Writes the trained model; where it cannot be written, what it can be had from later.

    Raises:
        NonFinite: the model is broken.
        WriteError: the model could not be written; the message says what was.
    """
    folder = run.config.output_dir / MODEL
    _before_writing(run)
    # Mixed precision has wrapped the model's forward.
    unpatch_model(run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False))
    try:
        save_model(run.accelerator, run.model, run.tokenizer, folder)
    except WriteError as error:
        raise WriteError(f"{error}; {_kept(run)}") from error
    return folder


def _before_writing(run: Run) -> None:
    """Frees the room that was set aside. Raises NonFinite for a broken model: it is not saved."""
    name = broken_parameter(run.accelerator, run.model)
    if name is not None:
        raise NonFinite(
            f"{name} is not finite any more; the model is not saved. "
            "Start anew with a lower learning rate"
        )
    on_main(run.accelerator, lambda: give_room(run.config.output_dir))


def _kept(run: Run) -> str:
    """Where the trained model is, in words, if it could not be written.

    Without a checkpoint of the last step one is tried, and with LoRA then the adapter alone.
    """
    last = f"step-{run.steps:07d}"
    try:
        if last not in [path.name for path in checkpoint_folders(run.config.output_dir)]:
            save(run, run.steps)
        return f"it is kept in the checkpoint {last}: make room, and --resume writes it"
    except WriteError as error:
        lost = str(error)
    if run.config.lora_rank == 0:
        return f"{lost}; every parameter was trained, so that nothing smaller would keep the work"
    folder = run.config.output_dir / ADAPTER
    try:
        save_adapter(run.accelerator, run.model, folder)
    except WriteError as error:
        return f"{lost}; {error}"
    return f"{lost}; the trained adapter alone is kept in {folder}, as PEFT loads it"


def how_to_go_on(run: Run, checkpoint: Path) -> str:
    """Says how to go on from a checkpoint of the run."""
    config = run.config.output_dir / CONFIG
    return f"bft train --config {config} --resume goes on from {checkpoint.name}"

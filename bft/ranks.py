"""The processes of a run: how they are started, and how they come to one decision."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from bft.config import TrainConfig

Value = TypeVar("Value")
_parted: list[Any] = []  # groups of processes that ended


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The run's processes, devices and mixed precision.

    Raises:
        RuntimeError: a launcher started several processes that accelerate does not join.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun does not tell accelerate that it is to use CPUs: each process would be a run of
    # its own, a rank 0 that writes into the folder of the others.
    on_cpus = "LOCAL_RANK" in os.environ and launched > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpus,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(config.output_dir),
    )
    if accelerator.num_processes != launched and launched > 1:
        raise RuntimeError(
            f"WORLD_SIZE: got {launched}, but accelerate runs {accelerator.num_processes} process; "
            "start the run with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return accelerator


def end(accelerator: Accelerator) -> None:
    """Closes the trackers and parts the processes, after work that all of them did."""
    # Gloo's destructor waits for its threads with Python's lock in its hand, and a thread may need
    # that lock to free the tensors of the last call: seen as a run in seven that never ended, on a
    # busy machine. So the group lives on until the interpreter ends.
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        _parted.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def on_main(accelerator: Any, function: Callable[[], Value]) -> Value:
    """What ``function`` returns on the main rank, on every rank; its error is every rank's, too.

    So no rank waits for one that has given up.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    value: Value = outcome[0]
    return value


def largest(accelerator: Any, number: int) -> int:
    """The largest of all ranks' numbers."""
    if accelerator.num_processes == 1:
        return number
    value = torch.tensor([number], dtype=torch.int64, device=accelerator.device)
    return int(accelerator.gather(value).max())


def gathered(items: list[Value]) -> list[Value]:
    """All ranks' items, in order of ranks."""
    everyone: list[Value] = gather_object(items)
    return everyone

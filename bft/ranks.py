"""The processes of a run: how they are started, and how they come to one decision."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from bft.config import TrainConfig

Value = TypeVar("Value")


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
    # Gloo's threads free the tensors of the last call when they come to it, and need Python's lock
    # for that. Its destructor waits for them with that lock in its hand: on a busy machine a run in
    # seven never ended. While this thread sleeps the lock is free.
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(0.5)
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

"""The processes of a run: how they are started, and how they come to one decision."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from bft.config import TrainConfig
from bft.trackers import trackers_of

Value = TypeVar("Value")


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The run's processes, devices and mixed precision.

    Raises:
        SettingError: a tracker is not installed.
        RuntimeError: a launcher started several processes that accelerate does not join.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun does not tell accelerate to use CPUs: each process would be a run of its own.
    on_cpus = "LOCAL_RANK" in os.environ and launched > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpus,
        mixed_precision=config.mixed_precision,
        log_with=trackers_of(config),
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
    # Gloo's threads need Python's lock to free the last call's tensors, and its destructor waits
    # for them while it holds that lock: one run in seven never ended on a busy machine. While this
    # thread sleeps the lock is free.
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(0.5)
    accelerator.end_training()


def on_main(accelerator: Any, function: Callable[[], Value]) -> Value:
    """What ``function`` returns or raises on the main rank, on every rank: none waits for ever."""
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

"""What draws a run while it goes on: TensorBoard, Weights & Biases, trackio.

accelerate starts and ends them, on the main rank alone. Each gets a row's numbers as they are, and
its histograms in its own type.
"""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from bft.config import SettingError, TrainConfig, plain

EVENTS, WANDB = "tensorboard", "wandb"  # folders of a run
PROJECT = "bft"


def trackers_of(config: TrainConfig) -> list[GeneralTracker] | None:
    """The trackers that the configuration names; nothing is started or written yet.

    Raises:
        SettingError: one is not installed.
    """
    for name in config.trackers:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            way_out = f"pip install {name}, or leave it out"
            raise SettingError(f"trackers: {name} is not installed; {way_out}") from None
    folder = config.output_dir
    trackers: list[GeneralTracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(EVENTS, folder))
    if "wandb" in config.trackers:
        mode = os.environ.get("WANDB_MODE", "offline")
        trackers.append(WandBTracker(PROJECT, name=folder.name, dir=str(folder), mode=mode))
    if "trackio" in config.trackers:
        trackers.append(TrackioTracker(PROJECT, name=folder.name))
    return trackers or None


def start_trackers(
    accelerator: Accelerator, config: TrainConfig
) -> Callable[[dict[str, Any], int], None] | None:
    """Starts the trackers. What is returned takes a row's values by name, and their step."""
    if not accelerator.log_with:
        return None
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in plain(config).items()
    }
    accelerator.init_trackers(PROJECT, config=settings)
    if not accelerator.is_main_process:
        return None
    return lambda values, step: track(accelerator.trackers, values, step)


def track(trackers: list[Any], values: dict[str, Any], step: int) -> None:
    """Hands on the numbers of ``values``, and its lists: histograms over [0, 1]."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    histograms = {name: value for name, value in values.items() if isinstance(value, list)}
    for tracker in trackers:
        if tracker.name == "tensorboard":
            for name, counts in histograms.items():
                _draw(tracker.writer, name, counts, step)
            tracker.log(numbers, step=step)  # and flushes
            continue
        if tracker.name == "wandb":
            from wandb import Histogram
        else:
            from trackio import Histogram
        drawn = [Histogram(np_histogram=(c, _edges(c))) for c in histograms.values()]
        # Not tracker.log: accelerate before 1.14 tells trackio no step.
        tracker.tracker.log(numbers | dict(zip(histograms, drawn, strict=True)), step=step)


def _edges(counts: list[float]) -> list[float]:
    return [edge / len(counts) for edge in range(len(counts) + 1)]


def _draw(writer: Any, name: str, counts: list[float], step: int) -> None:
    """TensorBoard's histogram; its moments are those of the bins' middles."""
    edges = _edges(counts)
    middles = [edge + edges[1] / 2 for edge in edges[:-1]]
    writer.add_histogram_raw(
        name,
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )

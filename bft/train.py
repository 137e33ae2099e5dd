"""The training loop, top to bottom: records, model, data, optimizer, steps, the written model."""

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from bft.checkpoint import load_progress
from bft.collapse import SPAN, collapse, warn_of_window
from bft.config import TrainConfig
from bft.data import AnswerDataset, Collator, StepBatches, collate_packed
from bft.encode import Record
from bft.held_out import Evaluator
from bft.limits import check_fits
from bft.load import load_model
from bft.loss import HeadLoss, aligned, undo_rank_mean
from bft.metrics import MetricLog, StepMeter
from bft.nonfinite import NonFinite, leave_out, what_is_not_finite
from bft.optimizer import clip, make_optimizer
from bft.patch import last_stats, patch_model
from bft.ranks import end, on_main, start_accelerator
from bft.records import read_jsonl
from bft.run import Run, how_to_go_on, save, write_model
from bft.run_folder import check_log, check_room, claimed, set_aside, start_log
from bft.same_run import identity
from bft.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)

LINES = 20  # of a run's progress, where no terminal shows a bar


@dataclass(frozen=True)
class TrainResult:
    """Where the model is, and what was measured."""

    model_dir: Path | None  # None without save_model
    steps: int
    history: list[dict[str, Any]]  # one row a step, see StepMeter.read
    evaluations: list[dict[str, Any]]  # rows of Evaluation.to_dict and "step"


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes as ``config`` says. The model is written, if it is to be, before it is evaluated.

    Raises:
        FolderInUse, SettingError: the output folder belongs to another run, or has no room.
        CheckpointError: the checkpoint to resume from is damaged, or of a run with other settings.
        NonFinite: a loss or gradient is not finite (``on_nonfinite="stop"``).
        WriteError: a checkpoint or the model could not be written; the message says what is left.
        Stopped: by SIGINT or SIGTERM, after a step and with a checkpoint.
    """
    accelerator = start_accelerator(config)
    config.check_device(accelerator.device.type)
    with claimed(accelerator, config):
        records = read(accelerator, "train_file", config.train_file)
        held_out = read(accelerator, "eval_file", config.eval_file, config.eval_limit)
        run = prepare(accelerator, config, records)
        config = run.config  # with the window as a number
        first = 0
        if config.resume:
            first = load_progress(accelerator, config.output_dir, run.identity)
        check_room(run, first)
        log = start_log(accelerator, config, first)
        set_aside(run, first)
        evaluator = Evaluator(run, held_out, records, log)
        del records  # only their answers are needed from here on
        try:
            if config.eval_first if first == 0 else due(first, config.eval_every):
                evaluator.run(first)
            with StopRequest() as stop:
                take_steps(run, first, log, evaluator, stop)
                model_dir = write_model(run) if config.save_model else None
                if number := stop.agreed(accelerator):
                    what = model_dir or "the model"
                    raise Stopped(number, f"after the last step: {what} is not evaluated")
            evaluator.run(run.steps)
            check_log(accelerator, log, model_dir)
        except (NonFinite, Stopped):  # on every rank
            end(accelerator)
            raise
        end(accelerator)
    skipped = sum(row["skipped"] > 0 for row in log.of("train"))
    if skipped and accelerator.is_main_process:
        logger.warning("the updates of %d of %d steps were left out", skipped, run.steps)
    return TrainResult(model_dir, run.steps, log.of("train"), log.of("eval"))


def read(
    accelerator: Accelerator, name: str, path: Path | None, limit: int | None = None
) -> list[Record]:
    """The records of a file, or of a pipe, which can be read only once."""
    if path is None:
        return []
    if accelerator.num_processes > 1 and path.exists() and not path.is_file():
        raise ValueError(
            f"{name}: {path} is no regular file, and {accelerator.num_processes} processes cannot "
            "all read it; write it to a file first"
        )
    return read_jsonl(path, limit=limit)


def prepare(accelerator: Accelerator, config: TrainConfig, records: list[Record]) -> Run:
    """Model, data, optimizer and schedule before the first step."""
    set_seed(config.seed)
    model, tokenizer = load_model(config)
    dataset = AnswerDataset(
        records, tokenizer, max_length=config.max_length, progress=accelerator.is_main_process
    )
    if config.window == "auto":
        config = replace(config, window=dataset.auto_window())
        if accelerator.is_main_process:
            logger.info("window auto: %s labelled tokens", config.window)
    loss = config.loss()
    patch_model(model, loss)

    check_fits(dataset.examples, model, tokenizer)
    if accelerator.is_main_process:
        labels = [example.labelled for example in dataset.examples]
        assert config.window != "auto"
        warn_of_window(config.scheme, config.window, labels)
    batches = StepBatches(
        len(dataset),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        seed=config.seed,
        lengths=None if config.packing else [len(e.input_ids) for e in dataset.examples],
    )
    steps = config.steps or batches.steps_in(config.epochs or 1.0)
    known_by = on_main(
        accelerator,
        lambda: identity(config, steps, accelerator.num_processes, dataset.examples, model),
    )

    optimizer, schedule = make_optimizer(config, model, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        loss=loss,
        dataset=dataset,
        batches=batches,
        collate=collate_packed if config.packing else Collator.of(tokenizer),
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        identity=known_by,
    )


def take_steps(
    run: Run, first: int, log: MetricLog, evaluator: Evaluator, stop: StopRequest
) -> None:
    """The optimizer steps after ``first``, with the evaluations and checkpoints between them."""
    config, accelerator = run.config, run.accelerator
    batches = micro_batches(run, first)
    run.model.train()
    main, shown = accelerator.is_main_process, sys.stderr.isatty()
    warned = not main
    progress = tqdm(
        range(first, run.steps),
        initial=first,
        total=run.steps,
        desc=f"train {config.scheme}",
        unit="step",
        disable=not (main and shown),
    )
    with progress:
        for step in progress:
            values = training_step(accelerator, run.model, run.loss, next(batches))
            values["grad_norm"] = clip(accelerator, run.model, config.max_grad_norm)
            values["learning_rate"] = run.schedule.get_last_lr()[0]
            values["skipped"] = float(not update(run, step, values))
            if not due(step + 1, config.histogram_every):
                values = {k: value for k, value in values.items() if not isinstance(value, list)}
            log.write("train", step + 1, values)
            now = (
                f"loss {values['loss']:.4f}, nll {values['nll']:.3f}, "
                f"{values['tokens_per_second']:.0f} tok/s, peak {values['peak_gib']:.2f} GiB"
            )
            progress.set_postfix_str(now)
            if main and not shown and due(step + 1, max(1, run.steps // LINES), last=run.steps):
                logger.info("step %d of %d: %s", step + 1, run.steps, now)
            if not warned and due(step + 1, SPAN) and (told := collapse(log.of("train"))):
                logger.warning("step %d: %s", step + 1, told)
                warned = True
            number = stop.agreed(accelerator)
            if not number and due(step + 1, config.eval_every) and step + 1 < run.steps:
                evaluator.run(step + 1)
                number = stop.agreed(accelerator)
            if number or due(step + 1, config.save_every, last=run.steps):
                folder = save(run, step + 1)
                number = number or stop.agreed(accelerator)
            if number:
                done = f"after step {step + 1} of {run.steps}"
                raise Stopped(number, f"{done}; {how_to_go_on(run, folder)}")


def micro_batches(run: Run, first: int) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each step after ``first``, where the model is."""
    run.batches.start(first, run.steps)
    parts = ([run.dataset[record] for record in part] for part in run.batches)
    for _ in range(first, run.steps):
        batches = [run.collate(next(parts)) for _ in range(run.config.accumulation)]
        yield send_to_device(batches, run.accelerator.device, non_blocking=True)


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    loss: HeadLoss,
    micro_batches: list[dict[str, Tensor]],
) -> dict[str, Any]:
    """Gradients of one optimizer step: those of the one big batch, however it is cut."""
    batches = [aligned(batch) for batch in micro_batches]
    items = torch.stack([loss.count_items(*batch["targets"][:2]) for batch in batches]).sum()
    num_items = accelerator.reduce(items, reduction="sum").clamp_min(1)
    meter = StepMeter(accelerator.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**batch, num_items=num_items)
            accelerator.backward(undo_rank_mean(output.loss))
        meter.add(output.loss, batch["targets"], last_stats(model), loss.normalize)
    return meter.read(accelerator)


def update(run: Run, step: int, values: dict[str, Any]) -> bool:
    """The optimizer's step; False if it was left out because a number is not finite."""
    accelerator, wrong = run.accelerator, what_is_not_finite(run.accelerator, values)
    if wrong is None:
        run.optimizer.step()
        taken = not accelerator.optimizer_step_was_skipped  # by the scaler of float16 gradients
    else:
        leave_out(run, step, wrong)
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        taken = False
    run.schedule.step()
    run.optimizer.zero_grad()
    return taken


def due(step: int, every: int | None, last: int | None = None) -> bool:
    """Whether what happens every so many steps (and after the last) happens after this one."""
    return every is not None and (step % every == 0 or step == last)

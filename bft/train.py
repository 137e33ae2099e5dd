"""The training loop, top to bottom: model, data, optimizer, steps, evaluation, checkpoint."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from bft.checkpoint import load_progress, save_model, save_progress
from bft.config import TrainConfig, plain
from bft.data import AnswerDataset, Collator, StepBatches, collate_packed, read_jsonl
from bft.evaluate import Evaluation, evaluate
from bft.limits import check_fits
from bft.load import load_pretrained
from bft.lora import add_adapters
from bft.loss import HeadLoss, batch_targets, undo_rank_mean
from bft.metrics import MetricLog, StepMeter
from bft.patch import last_stats, patch_model, unpatch_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where the model is, and what was measured."""

    model_dir: Path
    steps: int
    history: list[dict[str, Any]]  # one row a step, see StepMeter.read
    evaluations: list[dict[str, Any]]  # rows of Evaluation.to_dict and "step"


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes as ``config`` says; see the module's parts for the details."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(config.output_dir),
    )
    config.check_device(accelerator.device.type)
    set_seed(config.seed)
    model, tokenizer = load_model(config)
    loss = config.loss()
    patch_model(model, loss)

    dataset = AnswerDataset(
        read_jsonl(config.train_file),
        tokenizer,
        max_length=config.max_length,
        progress=accelerator.is_main_process,
    )
    check_fits(dataset.examples, model, tokenizer)
    batches = StepBatches(
        len(dataset),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        seed=config.seed,
        lengths=None if config.packing else dataset.lengths,
    )
    steps = config.steps or batches.steps_in(config.epochs or 1.0)
    collate = collate_packed if config.packing else Collator.of(tokenizer)

    optimizer = torch.optim.AdamW(
        decay_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
    )
    warmup = round(config.warmup_ratio * steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)

    first = load_progress(accelerator, config.output_dir) if config.resume else 0
    log = start_log(accelerator, config, first)
    evaluator = Evaluator(accelerator, config, tokenizer, log)
    if first == 0:
        evaluator.run(model, 0)

    batches.start(first, steps)
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate))
    model.train()
    progress = tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        desc=f"train {config.scheme}",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        micro_batches = [next(loader) for _ in range(config.accumulation)]
        micro_batches = [to_device(batch, accelerator.device) for batch in micro_batches]
        values = training_step(accelerator, model, loss, micro_batches)
        values["grad_norm"] = clip(accelerator, model, config.max_grad_norm)
        values["learning_rate"] = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.write("train", step + 1, values)
        if config.tensorboard:
            accelerator.log({f"train/{name}": value for name, value in values.items()}, step + 1)
        progress.set_postfix_str(
            f"loss {values['loss']:.4f}, nll {values['nll']:.3f}, "
            f"{values['tokens_per_second']:.0f} tok/s, peak {values['peak_gib']:.2f} GiB"
        )
        if step + 1 < steps and due(step + 1, config.eval_every):
            evaluator.run(model, step + 1)
        if due(step + 1, config.save_every):
            save_progress(accelerator, config.output_dir, step + 1, config.keep_checkpoints)
    progress.close()
    if first < steps:
        evaluator.run(model, steps)

    model_dir = config.output_dir / "model"
    unpatch(accelerator, model)
    save_model(accelerator, model, tokenizer, model_dir)
    accelerator.end_training()
    return TrainResult(model_dir, steps, log.of("train"), log.of("eval"))


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    loss: HeadLoss,
    micro_batches: list[dict[str, Tensor]],
) -> dict[str, float]:
    """Gradients of one optimizer step: those of the one big batch, however it is cut.

    The loss divides by the documents (or tokens) of all micro-batches on all ranks, counted first.
    """
    targets = [batch_targets(batch) for batch in micro_batches]
    items = torch.stack([loss.count_items(*target) for target in targets]).sum()
    num_items = accelerator.reduce(items, reduction="sum").clamp_min(1)
    meter = StepMeter(accelerator.device)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**batch, num_items=num_items)
            accelerator.backward(undo_rank_mean(output.loss))
        meter.add(output.loss, targets[index][0], last_stats(model))
    return meter.read(accelerator)


def load_model(config: TrainConfig) -> tuple[nn.Module, Any]:
    """The model to train, with adapters and checkpointing as configured, and its tokenizer."""
    model, tokenizer = load_pretrained(config.model, getattr(torch, config.dtype))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora_rank > 0:
        model = add_adapters(model, config)
    return model, tokenizer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; weight decay applies to matrices, not to norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def clip(accelerator: Accelerator, model: nn.Module, max_norm: float) -> float:
    """Clips the gradients; returns their norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return float(accelerator.clip_grad_norm_(model.parameters(), limit))


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def unpatch(accelerator: Accelerator, model: nn.Module) -> None:
    """Gives the model its own forward back; mixed precision has wrapped it meanwhile."""
    unpatch_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False))


def start_log(accelerator: Accelerator, config: TrainConfig, first: int) -> MetricLog:
    """Opens metrics.jsonl and TensorBoard and writes the configuration beside them."""
    log = MetricLog(
        config.output_dir / "metrics.jsonl",
        enabled=accelerator.is_main_process,
        resumed_step=first,
    )
    if accelerator.is_main_process:
        (config.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    if config.tensorboard:
        settings = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in plain(config).items()
        }
        accelerator.init_trackers("tensorboard", config=settings)
    return log


class Evaluator:
    """Held-out evaluation at a step. Every rank evaluates all records, so shards stay in step."""

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, tokenizer: Any, log: MetricLog
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self.tokenizer, self.log = tokenizer, log
        self.records = None
        if config.eval_file is not None:
            self.records = read_jsonl(config.eval_file, limit=config.eval_limit)

    def run(self, model: nn.Module, step: int) -> Evaluation | None:
        if self.records is None:
            return None
        result = evaluate(
            self.accelerator.unwrap_model(model),
            self.tokenizer,
            self.records,
            train=self.config.train_file,
            max_length=self.config.max_length,
            progress=self.accelerator.is_main_process,
        )
        self.log.write("eval", step, result.to_dict())
        numbers = {name: v for name, v in result.to_dict().items() if isinstance(v, int | float)}
        if self.config.tensorboard:
            self.accelerator.log({f"eval/{name}": v for name, v in numbers.items()}, step)
        return result

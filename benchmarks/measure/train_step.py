"""The work of the processes of ``python -m benchmarks train``: real steps on rows of real text."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.measure.memory import in_use, keep_memory, release, return_memory
from benchmarks.measure.processes import explain, first_line
from benchmarks.measure.timing import synchronize
from benchmarks.providers.at_head import find
from bft.config import TrainConfig
from bft.encode import encode
from bft.head import LogitTransform
from bft.load import load_model, pretrained
from bft.loss import Head, LossFunction
from bft.optimizer import decay_groups
from bft.patch import patch_model, unpatch_model
from bft.records import read_jsonl
from bft.tasks import hpo

_WARM_UP = 16  # tokens of the step that makes the optimizer's state


@dataclass(frozen=True)
class Job:
    """A step, without its loss and its tokens."""

    settings: TrainConfig
    device: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step in a process of its own."""

    status: Literal["fits", "over", "slow", "failed"]
    peak: int | None = None  # bytes, if the step was completed
    reason: str = ""


class Clock:
    """Measures the seconds of a step's parts; on a GPU a part ends when its work is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        self.parts: dict[str, float] = {}
        synchronize(self.device)
        self.since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Ends the part now; the next one begins."""
        synchronize(self.device)
        now = time.perf_counter()
        self.parts[part] = now - self.since
        self.since = now

    def enter_head(self, hidden: Tensor) -> None:
        """Ends the layers' forward, and the head's backward once ``hidden`` has its gradient."""
        self.lap("layers_forward")
        hidden.register_hook(lambda _: self.lap("head_backward"))


class Stepper:
    """A model with its AdamW; losses take turns at its head."""

    def __init__(self, job: Job) -> None:
        self.device, self.settings = job.device, job.settings
        self.model = load_model(job.settings)[0].to(job.device).train()
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, job.settings.weight_decay),
            lr=job.settings.learning_rate,
            betas=(0.9, 0.95),
        )
        self.transform: LogitTransform | None = None
        self.clock = Clock(job.device)

    def step(self, label: str, ids: Tensor) -> Tensor:
        """Runs forward, backward, clipping and optimizer on ``ids [B, T]``; returns the loss.

        ``clock.parts`` then has the seconds of each of :data:`benchmarks.results.schema.PARTS`.
        """
        ids = ids.to(self.device)
        self.clock.start()
        with self._at_head(find(label).make(self.settings)):
            # A cache of keys and values would take memory that has nothing to do with the loss.
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            self.clock.lap("head_forward")
            loss.backward()
        self.clock.lap("layers_backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.lap("optimizer")
        return loss.detach()

    @contextmanager
    def _at_head(self, loss: LossFunction | None) -> Iterator[None]:
        """Within this context the model computes ``loss``, or its own if that is ``None``."""
        if loss is None:
            with self.model.get_output_embeddings().register_forward_pre_hook(
                lambda _, inputs: self.clock.enter_head(inputs[0])
            ):
                yield
            return

        def watched(hidden: Tensor, head: Head, *targets: Any) -> tuple[Tensor, Any]:
            # The patch measures this on its first call, and not again in every step.
            self.transform = LogitTransform(head.softcap, head.temperature)
            self.clock.enter_head(hidden)
            return loss(hidden, head, *targets)

        known = self.transform
        patch_model(self.model, watched, transform=known, shift=True, verify=known is None)
        try:
            yield
        finally:
            unpatch_model(self.model)


def time_steps(
    job: Job, labels: list[str], turns: Tensor, keep: bool
) -> dict[str, list[dict[str, float]] | str]:
    """Seconds of the parts of each loss's steps, in turns; the reason if a loss fails.

    The first turn warms up. Of the token ids ``[turns, B, T]`` all losses of a turn see the same.
    """
    _be_quiet()
    if keep:
        keep_memory()
    stepper, failed = Stepper(job), {}
    samples: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
    for ids in turns:
        for label in [label for label in labels if label not in failed]:
            try:
                stepper.step(label, ids)
                samples[label].append(stepper.clock.parts)
            except Exception as error:
                stepper.optimizer.zero_grad()
                failed[label] = explain(error)
    return {label: failed.get(label, found[1:]) for label, found in samples.items()}


def send_peak(sender: Connection, job: Job, label: str, ids: Tensor, limit: int | None) -> None:
    """Runs a step on ``ids [B, T]``; sends ``None`` when it starts, then its :class:`Outcome`.

    A short step before it makes the optimizer's state, which all but the first step of a training
    have. The peak of loading the model does not count.
    """
    _be_quiet()
    try:
        if job.device == "cpu":
            return_memory()
        stepper = Stepper(job)
        stepper.step(label, ids[:1, :_WARM_UP])
        release(job.device)
        if job.device == "cuda" and limit is not None:  # on a CPU the parent watches the memory
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        in_use(job.device, reset=True)
        sender.send(None)
        stepper.step(label, ids)
        synchronize(job.device)
        sender.send(Outcome("fits", in_use(job.device, peak=True)))
    except torch.OutOfMemoryError as error:
        sender.send(Outcome("over", reason=first_line(error)))
    except Exception as error:
        sender.send(Outcome("failed", reason=explain(error)))


def _be_quiet() -> None:
    """Turns off progress bars and warnings of transformers: the parent reports progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def documents(settings: TrainConfig, texts: Path | None) -> Iterator[list[int]]:
    """Token ids of one document after the other: lines of a text file, or the demo's records."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(pretrained(settings.model)))
    if texts is None:
        folder = settings.train_file.parent
        hpo.build(folder)
        for record in read_jsonl(settings.train_file):
            yield encode(record, tokenizer).input_ids
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with texts.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield [*tokenizer(line.strip()).input_ids, *end]


def token_rows(documents: Iterable[list[int]], length: int, count: int) -> Tensor:
    """Token ids ``[count, length]`` of joined documents, repeated if too few; or SystemExit."""
    tokens = itertools.chain.from_iterable(documents)
    found = list(itertools.islice(tokens, count * length))
    full = len(found) // length
    if full == 0:
        raise SystemExit(f"texts: got {len(found)} tokens, expected at least length, {length}")
    return torch.tensor(found[: full * length]).view(full, length)[torch.arange(count) % full]

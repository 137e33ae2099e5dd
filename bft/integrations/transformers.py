"""Hugging Face's ``Trainer`` with the fused loss."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import has_length

from bft.data import Collator
from bft.encode import Example, Record, weights_of_labels
from bft.head import UnsupportedModel
from bft.loss import IGNORE, HeadLoss, batch_targets
from bft.patch import patch_model, state_of, use_loss
from bft.records import meant_as_weight, read_weight

logger = logging.getLogger(__name__)


def labelled(inputs: Mapping[str, Any], stats: Any) -> Tensor:
    """Which positions of ``stats`` predict a label.

    PEFT puts its virtual tokens first in a row, and so the row's first label is predicted, too.
    """
    target = batch_targets(inputs).target
    if (virtual := stats.nll.shape[1] - target.shape[1]) > 0:
        target = nn.functional.pad(inputs["labels"], (virtual - 1, 1), value=IGNORE)
    return target != IGNORE


def columns_of(data: Any) -> set[str]:
    """The names in a data set's rows, as far as they are known before it is read."""
    names = getattr(data, "column_names", None)
    if names is None and isinstance(data, Sequence) and len(data) and isinstance(data[0], Mapping):
        names = data[0]
    return set(names or ())


_WEIGHTS = ("token_weight", "weight")  # columns of tokenised rows


def _datasets(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A trainer's data sets, by how an error calls them."""
    for name in ("train_dataset", "eval_dataset"):
        if isinstance(data := given.get(name), dict):
            yield from ((f"{name}[{key!r}]", one) for key, one in data.items())
        else:
            yield name, data


def check_names(name: str, columns: Iterable[str]) -> None:
    """Raises ValueError for a column that seems to mean weights, and would be dropped."""
    if (column := meant_as_weight(columns, _WEIGHTS)) is not None:
        raise ValueError(
            f"{name}: got a column {column!r}, expected 'weight' or 'token_weight', or another name"
        )


@dataclass(frozen=True)
class RowCollator:
    """Right-padded batches of tokenised rows, with the weights of their labels.

    A row has ``input_ids``, and it may have ``labels`` (else the ids are), an ``attention_mask``,
    and ``token_weight``, one number a token, or ``weight``: one number, or one for each label.
    """

    pad: Collator

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The tokenizer's pad token; the mask hides it, so that without a tokenizer it is 0."""
        return cls(Collator(0) if tokenizer is None else Collator.of(tokenizer))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` and ``token_weight``, each ``[B, T]``."""
        return self.pad([_example(row) for row in rows])


def _example(row: Mapping[str, Any]) -> Example:
    ids, labels, mask, given = (
        None if (value := row.get(name)) is None else list(map(_number, value))
        for name in ("input_ids", "labels", "attention_mask", "token_weight")
    )
    labels = labels or ids or []
    if given is None and row.get("weight") is not None:
        whole = Record((), weight=read_weight(row, "a row", "weight"))
        given = weights_of_labels(whole, labels)
    columns = [x for x in (ids, labels, given) if x is not None]
    if mask is not None:
        columns = [[x for x, kept in zip(column, mask, strict=True) if kept] for column in columns]
    ids, labels, *weights = columns
    return Example(ids, labels, weights=weights[0] if weights else None)


def _number(value: Any) -> Any:
    """A number as Python's own, whatever array it came from."""
    return value.item() if hasattr(value, "item") else value


class BFTTrainer(Trainer):
    """``transformers.Trainer`` for a causal LM, trained with a :class:`bft.HeadLoss`.

    It takes what ``Trainer`` takes, and the fields of ``HeadLoss`` as keyword arguments. The model
    is patched (:func:`bft.patch_model`) and stays so.

    A step's loss is divided by its documents (``normalize="sequence"``) or labelled tokens, those
    of all its micro-batches, and of all ranks while ``average_tokens_across_devices`` is on. Logs
    hold means of the labelled tokens' ``nll``, ``confidence`` and ``token_weight``, and of the
    documents' ``sequence_weight``, since the last log, or in the evaluation. There, rows that
    several ranks repeat to fill their last batch count again, which ``eval_loss`` leaves out.

    Raises:
        ValueError: an argument that would go past the loss, or of which the loss is not right.
        UnsupportedModel: as ``patch_model``, and a model whose labels are not shifted.
    """

    loss_is_scaled_for_ga: Any = True  # by num_items
    model: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = {field.name for field in fields(HeadLoss)} & kwargs.keys()
        self.head_loss = HeadLoss(**{name: kwargs.pop(name) for name in names})
        self._sums: dict[bool, Tensor] = {}  # of training, and of evaluation
        self._by_document = replace(self.head_loss, normalize="sequence")
        self._logits_told = False
        signature = inspect.signature(super().__init__)
        for name in [name for name in kwargs if name not in signature.parameters]:
            known = [*signature.parameters, *(field.name for field in fields(HeadLoss))]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", such as {near[0]}" if near else ""
            raise TypeError(
                f"{name}: unexpected argument of {type(self).__name__}, expected one of the "
                f"trainer or a field of HeadLoss{hint}"
            )
        given = signature.bind_partial(*args, **kwargs).arguments
        for name, data in _datasets(given):
            check_names(name, sorted(columns_of(data)))
        self._weighted = False
        if (collator := self._collator_of_weights(given)) is not None:
            kwargs["data_collator"] = collator
        if getattr(given.get("args"), "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel: got True, expected False: Liger's forward would take the place "
                "of the fused loss"
            )
        super().__init__(*args, **kwargs)
        way_out = "expected none: the loss is that of scheme and the other fields of HeadLoss"
        for name, got, expected in (
            ("compute_loss_func", self.compute_loss_func, way_out),
            ("label_smoothing_factor", self.args.label_smoothing_factor, way_out),
            ("n_gpu", self.args.n_gpu > 1 and self.args.n_gpu, "expected 1: start with torchrun"),
            (
                "parallelism_config",
                self.get_cp_size() * self.get_sp_size() > 1 and "sequences in parts",
                "expected whole ones, since windows and document weights look at all of them",
            ),
        ):
            if got:
                raise ValueError(f"{name}: got {got}, {expected}")
        self._patched(self.model)

    def _collator_of_weights(self, given: Mapping[str, Any]) -> Any:
        """A collator for training data with weights; ``None`` without, or if one is given."""
        columns = {name: columns_of(data) for name, data in _datasets(given)}
        weighted = [name for name in columns if not columns[name].isdisjoint(_WEIGHTS)]
        self._weighted = "train_dataset" in weighted
        if not weighted:
            return None
        if given.get("data_collator") is None:
            return RowCollator.of(given.get("processing_class"))
        for name in weighted:
            if "weight" in columns[name]:
                raise ValueError(
                    f"{name}: got a column weight with a data_collator, expected a column "
                    "token_weight, which the collator pads as labels, or no data_collator"
                )
        return None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        missing = [name for name in _WEIGHTS if name not in self._signature_columns]
        self._signature_columns += missing  # a collator reads them

    def _patched(self, model: Any) -> Any:
        """The model, patched now or by another trainer before; this one's loss is asked for."""
        if state_of(model) is None:
            patch_model(model, self.head_loss)
        state = state_of(model)
        assert state is not None
        state.logits_told = True  # here prediction_step tells more
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._patched(super().call_model_init(trial))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._weighted and self.model.training and "token_weight" not in inputs:
            raise ValueError(
                "token_weight: train_dataset has weights, but the batch has none, expected a "
                "data_collator that pads it as labels are padded"
            )
        with use_loss(model, self.head_loss):
            outputs = model(**inputs, num_items=num_items_in_batch)
            state = state_of(model)
        assert state is not None
        if state.shift is False:
            raise UnsupportedModel(
                f"model: position t of {type(self.model).__name__} predicts labels[t], expected a "
                "causal LM, which predicts labels[t + 1]"
            )
        self._add(inputs, state.stats)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        if num_items_in_batch is not None:
            if not self.model.training:  # Trainer leaves out what is not finite, as its own 0 / 0
                items = torch.as_tensor(num_items_in_batch, dtype=torch.int64, device=loss.device)
                loss = loss.masked_fill(items == 0, torch.nan)
            if self.args.average_tokens_across_devices:
                # It is this rank's part of a sum, and gradients are averaged over ranks.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | None:
        """What the loss of these micro-batches is divided by: documents or labelled tokens."""
        if not batch_samples:
            return None
        counts = [self.head_loss.count_items(*batch_targets(batch)[:2]) for batch in batch_samples]
        items = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices:
            items = self.accelerator.reduce(items, reduction="sum")
        return items // self.get_tp_size()  # whose ranks hold the same batch

    def _add(self, inputs: dict[str, Any], stats: Any) -> None:
        """A call's sums over labelled tokens and documents, added to those of its kind."""
        documents = self._by_document.count_items(*batch_targets(inputs)[:2])
        weights = (stats.token_weight, stats.sequence_weight)
        parts = (labelled(inputs, stats), documents, stats.nll, stats.confidence, *weights)
        sums = torch.stack([part.sum().to(stats.nll) for part in parts])
        training = self.model.training
        self._sums[training] = self._sums.get(training, torch.zeros_like(sums)) + sums

    def _means(self, training: bool) -> dict[str, float]:
        """The means of what was added on all ranks, which begin anew."""
        if (sums := self._sums.pop(training, None)) is None:
            return {}
        sums = self.accelerator.reduce(sums, reduction="sum")
        tokens, documents, nll, confidence, token_weight, sequence_weight = sums.tolist()
        of_tokens = {"nll": nll, "confidence": confidence, "token_weight": token_weight}
        means = {name: value / max(tokens, 1.0) for name, value in of_tokens.items()}
        return means | {"sequence_weight": sequence_weight / max(documents, 1.0)}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # the training's
            logs.update(self._means(training=True))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._sums.pop(False, None)
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._means(training=False).items()
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        if not prediction_loss_only:  # torch.compile leaves the logits out
            model = getattr(model, "_orig_mod", model)
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        if logits is not None:
            logits = nested_detach(logits)  # read now, while the batch is at hand
            self._tell_of(logits)
        return loss, logits, labels

    def _tell_of(self, logits: Any) -> None:
        """Warns, once, if the logits of all batches will be kept."""
        reduced = self.preprocess_logits_for_metrics or self.args.batch_eval_metrics
        if reduced or self._logits_told:
            return
        self._logits_told = True
        nbytes = sum(part.nbytes for part in tree_leaves(logits)) * self.args.world_size
        batches = self.callback_handler.eval_dataloader
        total = f", {nbytes * len(batches)} in all," if has_length(batches) else ""
        logger.warning(
            "the logits of an evaluation are kept: %d bytes a batch%s because no "
            "preprocess_logits_for_metrics returns something smaller of each",
            nbytes,
            total,
        )

"""TRL's ``SFTTrainer`` with the fused loss."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from bft.encode import Record, weights_of_labels
from bft.head import causal_lm
from bft.integrations.transformers import BFTTrainer, check_names, columns_of, labelled
from bft.loss import IGNORE
from bft.patch import last_stats
from bft.records import check_weight_name, read_weight, turn_weight


@dataclass
class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, and ``token_weight`` laid out as it lays ``labels`` out."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with ``token_weight [B, T]`` if the rows have it; padding has 0."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "token_weight" in examples[0]:
            lists = [
                torch.as_tensor(row["token_weight"], dtype=torch.float32, device="cpu")
                for row in examples
            ]
            lists = [torch.cat(lists)] if self.padding_free else lists
            weights = torch.zeros(batch["labels"].shape, dtype=torch.float32, device="cpu")
            for into, values in zip(weights, lists, strict=True):
                into[: len(values)] = values
            batch["token_weight"] = weights
        return batch


class BFTSFTTrainer(BFTTrainer, SFTTrainer):
    """``trl.SFTTrainer``, trained with a :class:`bft.HeadLoss`.

    It takes what ``SFTTrainer`` takes, and the fields of ``HeadLoss`` as keyword arguments: see
    :class:`bft.integrations.transformers.BFTTrainer`. Logs hold TRL's own means, too. Data may have
    a ``weight``, of a record or of an assistant turn, as for ``bft train``.

    Raises:
        ValueError: also for a ``loss_type``, in whose place is ``scheme``, and for weights that do
            not reach the loss.
        DataError: a weight is no number, or a list of the wrong length.
    """

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (loss_type := self.args.loss_type) != "nll":
            raise ValueError(
                f"loss_type: got {loss_type!r}, expected none: scheme={loss_type!r} and "
                "normalize='token' are that loss"
            )
        model = causal_lm(self.model)
        if hasattr(model, "router_aux_loss_coef"):  # TRL's own setting is for its own forward
            model.router_aux_loss_coef = self.router_aux_loss_coef
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator: Any = WeightedCollator(**vars(self.data_collator))
        columns = columns_of(self.train_dataset)
        self._weighted = "token_weight" in columns
        if "weight" in columns and not self._weighted:
            raise ValueError(
                "train_dataset: got a column weight in data that are not prepared, expected "
                "token_weight, one number a token"
            )

    def _collator_of_weights(self, given: Mapping[str, Any]) -> None:
        """TRL makes its own; see :meth:`_prepare_dataset`."""

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's tokens and labels, cut or packed together with the weights of the labels."""
        rest = (processing_class, args, packing, formatting_func, dataset_name)
        if not _has_weights(dataset, dataset_name):
            return super()._prepare_dataset(dataset, *rest)
        whole = copy.copy(args)  # nothing is cut before the weights are there
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        how: dict[str, Any] = {}
        if isinstance(dataset, Dataset):  # an IterableDataset takes neither
            how = {"num_proc": args.dataset_num_proc, "desc": f"Weights of {dataset_name} dataset"}
        weighted = {"name": dataset_name, "apart": args.assistant_only_loss}
        dataset = dataset.map(_weighted, with_indices=True, fn_kwargs=weighted, **how)
        dataset = dataset.select_columns(["input_ids", "labels", "token_weight"])
        if packing:
            if args.max_length is None:
                raise ValueError("max_length: got None with packing=True, expected a number")
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, how)
        elif args.max_length is not None:
            cut = {"length": args.max_length, "end": args.truncation_mode == "keep_end"}
            dataset = dataset.map(_cut, fn_kwargs=cut, **how).filter(_is_labelled, **how)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.aux_loss_enabled:  # some models look at the argument only
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        stats = last_stats(model)

        def scored(**_: Any) -> SimpleNamespace:
            """What TRL's own forward would return, for its metrics."""
            return SimpleNamespace(
                log_probs=-stats.nll,
                entropy=stats.entropy,
                is_top1=stats.correct,
                label_mask=labelled(inputs, stats),
                aux_loss=getattr(outputs, "aux_loss", None),
            )

        SFTTrainer.compute_loss(self, scored, dict(inputs), num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


_TURNS = ("messages", "conversations", "completion")  # TRL calls the second as the first


def _turns(row: Mapping[str, Any], names: tuple[str, ...] = _TURNS) -> dict[str, Mapping[str, Any]]:
    """The turns of a row that may be labelled, by where they stand."""
    name = next((name for name in names if name in row), "")
    turns = row.get(name)
    if not isinstance(turns, list):  # text
        return {}
    return {f"{name}[{place}]": turn for place, turn in enumerate(turns)}


def _has_weights(dataset: Any, name: str) -> bool:
    """Whether rows have weights; of a stream, whether a later row may have one."""
    if not isinstance(dataset, Dataset):
        return True
    columns = get_dataset_column_names(dataset)
    if "weight" in columns or "token_weight" in columns:
        return True
    turns = _turns(next(iter(dataset)))
    for place, turn in turns.items():  # in a table all turns have the same keys
        check_weight_name(turn, f"{name} dataset: '{place}'")
    return any("weight" in turn for turn in turns.values())


def _weighted(row: dict[str, Any], index: int, *, name: str, apart: bool) -> dict[str, Any]:
    """A prepared row's tokens and labels with ``token_weight``, from the weights that it came with.

    Rows that are tokenised already may have ``token_weight`` itself. ``apart`` says that only what
    the assistant wrote is labelled.
    """
    where, labels = f"{name} dataset, row {index}", row["labels"]
    weights = row.get("token_weight")
    check_names(where, row)
    if weights is None:
        turns = _turns(row)
        for place, turn in _turns(row, ("prompt",)).items():
            if turn.get("weight") is not None:
                raise ValueError(
                    f"{where}: '{place}.weight': got {turn['weight']}, expected none: a prompt has "
                    "no labels"
                )
        for place, turn in turns.items():
            check_weight_name(turn, f"{where}: '{place}'")
            own = turn_weight(turn, where, place)
            if own is not None and not (apart or place.startswith("completion")):
                raise ValueError(
                    f"{where}: '{place}.weight': got {own} with assistant_only_loss=False, "
                    "expected True: a turn's weight is that of what the assistant wrote"
                )
        record = Record(
            tuple(turns.values()) or ({"role": "assistant"},),
            where,
            weight=read_weight(row, where, "weight"),
        )
        weights = weights_of_labels(record, labels) or [1.0] * len(labels)
    return {"input_ids": row["input_ids"], "labels": labels, "token_weight": weights}


def _cut(row: dict[str, Any], length: int, end: bool) -> dict[str, Any]:
    kept = slice(-length, None) if end else slice(length)
    return {name: values[kept] for name, values in row.items()}


def _is_labelled(row: dict[str, Any]) -> bool:
    return any(label != IGNORE for label in row["labels"])

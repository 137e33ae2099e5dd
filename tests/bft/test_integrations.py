"""BFTTrainer beside transformers' Trainer, and what an evaluation gets of a patched model."""

import copy
import gc
import logging
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from bft.head import UnsupportedModel
from bft.integrations.transformers import BFTTrainer, RowCollator
from bft.logits import DeferredLogits
from bft.loss import HeadLoss
from bft.patch import fused_loss, patch_model, unpatch_model
from tests.support.allocations import measure_allocations
from tests.support.batches import SFT, rows
from tests.support.models import tiny
from tests.support.runs import one_step

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

LOSS = HeadLoss(window=4)
TOKEN = {"scheme": "sft", "normalize": "token"}
V, B, LENGTH = 997, 2, 12


def data(count=6):
    """Rows with different numbers of labels; one has none."""
    batch = rows(count, LENGTH)
    for row, labels in enumerate(batch["labels"]):
        labels[: 3 * row % 13] = -100
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def make(folder, kind=BFTTrainer, model=None, options=None, **settings):
    """A trainer of two rows a batch whose step shows in the weights as it is."""
    plain = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    sizes = {"per_device_train_batch_size": B, "per_device_eval_batch_size": B, "logging_steps": 1}
    settings = one_step(folder) | plain | {"max_grad_norm": 0.0} | sizes | settings
    return kind(
        tiny("LlamaForCausalLM") if model is None else model,
        hf.TrainingArguments(**settings),
        **{"train_dataset": data(), "eval_dataset": data()} | (options or {}),
    )


def of_kind(folder, kind, model=None, loss=TOKEN, options=None, **settings):
    """A Trainer of a model as it is ("trainer") or patched, or a BFTTrainer ("bft")."""
    model = tiny("LlamaForCausalLM") if model is None else model
    if kind == "patched":
        patch_model(model, HeadLoss(**loss))
    elif kind == "bft":
        return make(folder, BFTTrainer, model, loss | (options or {}), **settings)
    return make(folder, hf.Trainer, model, options, **settings)


BOTH = pytest.mark.parametrize("kind", ["patched", "bft"])


def weights(trainer):
    return {k: p.detach().clone() for k, p in trainer.model.named_parameters() if p.requires_grad}


def assert_close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **tolerance or {"rtol": 1e-4, "atol": 1e-6})


# --- training ------------------------------------------------------------------------------------


def lora(model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


SAME = ("loss", "gradient", "accumulation", "evaluation")


@pytest.mark.cell("Trainer", *SAME)
@pytest.mark.cell("BFTTrainer", *SAME)
@pytest.mark.parametrize(("kind", "wrap"), [("bft", ""), ("bft", "lora"), ("patched", "")])
def test_plain_fine_tuning_is_that_of_the_unpatched_trainer(tmp_path, kind, wrap):
    """The second step has one micro-batch of two, and one that BFTTrainer evaluates no labels."""
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.05}
    settings |= {"per_device_eval_batch_size": 1 if kind == "bft" else B}
    model = tiny("LlamaForCausalLM")
    model = (lora(model) if wrap else model).double()
    own = make(tmp_path, hf.Trainer, copy.deepcopy(model), **settings)
    ours = of_kind(tmp_path, kind, model, **settings)
    own.train()
    ours.train()
    assert_close(weights(ours), weights(own))
    for got, want in zip(ours.state.log_history[:3], own.state.log_history[:3], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert got["loss"] == pytest.approx(got.get("nll", got["loss"]), rel=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-4)


@BOTH
@pytest.mark.cell("Trainer", "packing")
@pytest.mark.cell("BFTTrainer", "packing")
def test_a_row_of_all_documents_is_a_batch_of_them(tmp_path, kind):
    found = []
    loss = {"window": 4} if kind == "bft" else TOKEN
    for size, collator in ((6, hf.DataCollatorWithFlattening()), (1, None)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
        trainer = of_kind(tmp_path, kind, None, loss, {"data_collator": collator}, **cut)
        rows = enumerate(trainer.train_dataset)
        trainer.train_dataset = [
            {k: v[: 7 + n].tolist() for k, v in row.items()} for n, row in rows
        ]
        trainer.train()
        found.append((weights(trainer), trainer.state.log_history[0]["loss"]))
    (packed, loss), (alone, other) = found
    assert loss == pytest.approx(other, rel=1e-4)
    assert_close(packed, alone)


@pytest.mark.cell("BFTTrainer", "loss", "gradient", "accumulation")
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (1, 6), (2, 3)])
def test_a_step_is_that_of_all_its_documents_however_it_is_cut(
    tmp_path, size, accumulation, normalize
):
    options = {"window": 4, **({} if normalize == "sequence" else {"normalize": normalize})}
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = make(tmp_path, options=options, **cut)
    model = copy.deepcopy(unpatch_model(copy.deepcopy(trainer.model)))
    whole = {name: torch.stack([row[name] for row in data()]) for name in data()[0]}
    loss, stats = fused_loss(model, whole, replace(LOSS, normalize=normalize))
    loss.backward()
    trainer.train()
    assert_close(weights(trainer), {k: p - 0.5 * p.grad for k, p in model.named_parameters()})

    logged, labelled = trainer.state.log_history[0], int((stats.nll > 0).sum())
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-4)
    for name, values, count in (
        ("nll", stats.nll, labelled),
        ("confidence", stats.confidence, labelled),
        ("token_weight", stats.token_weight, labelled),
        ("sequence_weight", stats.sequence_weight, 5),
    ):
        assert logged[name] == pytest.approx(float(values.sum()) / count, rel=1e-4)


@BOTH
@pytest.mark.cell("Trainer", "save", "resume")
@pytest.mark.cell("BFTTrainer", "save", "resume")
def test_the_best_model_is_loaded_and_a_sampled_run_is_resumed(tmp_path, kind):
    loss, metric = {"window": 4, "gradient": "sampled"}, "eval_nll"
    if kind == "patched":
        loss, metric = loss | {"normalize": "token"}, "eval_loss"
    keep = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    keep |= {"max_steps": 4, "load_best_model_at_end": True, "greater_is_better": False}
    keep |= {"learning_rate": 2.0, "metric_for_best_model": metric}
    trainer = of_kind(tmp_path, kind, None, loss, **keep)
    trainer.train()
    nll = {row["step"]: row[metric] for row in trainer.state.log_history if metric in row}
    best = min(nll, key=nll.get)
    assert trainer.state.best_metric == nll[best] < nll[4]
    folder = tmp_path / f"checkpoint-{best}"
    assert_close(weights(trainer), load_file(folder / "model.safetensors"), rtol=0, atol=0)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data()])}
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)

    last = load_file(tmp_path / "checkpoint-4/model.safetensors")
    keep["load_best_model_at_end"] = False
    resumed = of_kind(tmp_path, kind, None, loss, **keep)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(weights(resumed), last, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_trains_and_is_evaluated(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    options = {"window": 4, "compute_metrics": metrics}
    own, ours = (make(tmp_path, options=options, **s) for s in ({"max_steps": 2}, compiled))
    for trainer in (own, ours):
        trainer.train()
    assert hasattr(ours.model_wrapped, "_orig_mod")
    assert_close(weights(ours), weights(own))
    assert ours.evaluate()["eval_mean"] == pytest.approx(own.evaluate()["eval_mean"])
    ours.compute_metrics = None
    assert ours.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"])


def test_what_would_go_past_the_loss_is_refused(tmp_path, monkeypatch):
    for option, settings in (
        ({"compute_loss_func": lambda *a, **k: a[0].logits.sum()}, {}),
        ({}, {"label_smoothing_factor": 0.1}),
    ):
        name = next(iter(option | settings))
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected none: the loss is that"):
            make(tmp_path, options=option, **settings)
    for owner, name, value, refused in (
        (BFTTrainer, "get_sp_size", lambda self: 2, "parallelism_config: got sequences in parts"),
        (BFTTrainer, "get_cp_size", lambda self: 2, "parallelism_config: got sequences in parts"),
        (hf.TrainingArguments, "n_gpu", 2, "n_gpu: got 2"),
    ):
        monkeypatch.setattr(owner, name, value)
        with pytest.raises(ValueError, match=refused):
            make(tmp_path)
        monkeypatch.undo()
    with pytest.raises(
        TypeError, match=r"^windows: unexpected argument of BFTTrainer.*such as window"
    ):
        make(tmp_path, options={"windows": 4})
    with pytest.raises(UnsupportedModel, match="BertForMaskedLM predicts labels"):
        make(tmp_path, model=tiny("BertForMaskedLM")).train()


def test_weights_in_the_data_reach_the_loss_or_are_refused(tmp_path):
    settings = {"remove_unused_columns": False}
    plain = make(tmp_path, **settings).train().training_loss
    weighted = [{**row, "token_weight": torch.full((LENGTH,), 0.5)} for row in data()]
    got = make(tmp_path, options={"train_dataset": weighted}, **settings).train().training_loss
    assert got == pytest.approx(plain / 2)

    def drops(rows):
        return hf.default_data_collator([{k: r[k] for k in ("input_ids", "labels")} for r in rows])

    options = {"train_dataset": weighted, "data_collator": drops}
    with pytest.raises(ValueError, match="token_weight: train_dataset has weights, but the batch"):
        make(tmp_path, options=options, **settings).train()
    columns = [{**row, "weight": 0.5} for row in data()]
    with pytest.raises(ValueError, match="got a column weight with a data_collator"):
        make(tmp_path, options={"train_dataset": columns, "data_collator": drops})
    got = make(tmp_path, options={"train_dataset": columns}).train().training_loss
    assert got == pytest.approx(plain / 2)
    with pytest.raises(ValueError, match="use_liger_kernel: got True, expected False"):
        make(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("column", ["token_weight", "weight"])
def test_weights_multiply_each_labels_loss_after_the_scheme(tmp_path, column):
    factors = torch.randn(6, LENGTH)
    factors[2] = 0
    rows = data()
    for row, factor in zip(rows, factors, strict=True):
        row[column] = factor if column == "token_weight" else factor[row["labels"] != -100].tolist()
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make(tmp_path, options={"window": 4, "train_dataset": rows}, **cut)
    model = copy.deepcopy(unpatch_model(copy.deepcopy(trainer.model)))
    whole = {name: torch.stack([row[name] for row in data()]) for name in data()[0]}
    stats = fused_loss(model, whole, LOSS)[1]
    logits = model(**{k: v for k, v in whole.items() if k != "labels"}).logits[:, :-1]
    labels = whole["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    of_documents = (nll * stats.token_weight[:, :-1] * factors[:, 1:]).sum(1)
    of_documents = of_documents * stats.sequence_weight / (labels != -100).sum(1).clamp_min(1)
    loss = of_documents.sum() / 5
    loss.backward()
    trainer.train()
    assert_close(weights(trainer), {k: p - 0.5 * p.grad for k, p in model.named_parameters()})
    logged, labelled = trainer.state.log_history[0], int((labels != -100).sum())
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-4)
    for name in ("confidence", "token_weight"):
        assert logged[name] == pytest.approx(float(getattr(stats, name).sum()) / labelled, rel=1e-4)


def test_rows_with_weights_are_padded_and_lose_the_padding_that_they_bring():
    rows = [
        {"input_ids": [4, 5, 6], "weight": -0.5},
        {"input_ids": [7, 8, 9, 3], "labels": [-100, 8, 9, -100], "weight": [0.5, 2.0]},
        {"input_ids": np.array([1, 1, 5]), "attention_mask": np.array([0, 0, 1])},
        {"input_ids": [2, 6], "labels": [-100, 6], "token_weight": torch.tensor([9.0, 0.0])},
    ]
    batch = RowCollator.of(None)(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 0], [7, 8, 9, 3], [5, 0, 0, 0], [2, 6, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 1, 2]
    assert batch["labels"].tolist() == [
        [4, 5, 6, -100],
        [-100, 8, 9, -100],
        [5, -100, -100, -100],
        [-100, 6, -100, -100],
    ]
    assert batch["token_weight"].tolist() == [
        [-0.5, -0.5, -0.5, 0],
        [0, 0.5, 2.0, 0],
        [1, 0, 0, 0],
        [9, 0, 0, 0],
    ]
    assert "token_weight" not in RowCollator.of(None)(rows[2:3])


@pytest.mark.parametrize("name", ["wieght", "Weight", "weights", "token_weights", "loss_scale"])
def test_a_column_that_means_weights_is_not_dropped(tmp_path, name):
    rows = [{**row, name: 0.5, "height": 2} for row in data()]
    for where, given in (
        ("train_dataset", {"train_dataset": rows}),
        (r"eval_dataset\['b'\]", {"eval_dataset": {"a": data(), "b": rows}}),
    ):
        with pytest.raises(ValueError, match=f"^{where}: got a column '{name}', expected 'weight'"):
            make(tmp_path, options=given)


def test_an_evaluation_has_its_own_weights(tmp_path):
    rows = [{**row, "weight": 0.5} for row in data()]
    plain = make(tmp_path)
    loss = plain.evaluate()["eval_loss"]
    assert make(tmp_path, options={"eval_dataset": rows}).evaluate()["eval_loss"] == loss / 2
    with pytest.raises(TypeError, match=r"^weight: the fused loss knows no such argument"):
        plain.predict(rows)


def test_each_trainer_of_a_model_has_its_own_loss(tmp_path):
    first = make(tmp_path, options=TOKEN)
    second = make(tmp_path, model=first.model, options={"window": 4})
    values = [trainer.evaluate()["eval_loss"] for trainer in (first, second, first)]
    assert values[0] == values[2] != values[1]
    unpatch_model(first.model)
    assert first.evaluate()["eval_loss"] == values[0]

    fresh = BFTTrainer(
        None,
        hf.TrainingArguments(**one_step(tmp_path), logging_steps=1),
        train_dataset=data(),
        model_init=lambda: tiny("LlamaForCausalLM"),
    )
    fresh.train()
    assert "sequence_weight" in fresh.state.log_history[0]


# --- evaluation ----------------------------------------------------------------------------------


def evaluated(folder, kind, model="LlamaForCausalLM", settings=None, **options):
    """A trainer, its model of a larger vocabulary."""
    model = tiny(model, vocab_size=V)
    return of_kind(folder, kind, model, options=options, **settings or {})


def metrics(prediction):
    return {"mean": float(prediction.predictions.mean())}


@pytest.mark.parametrize("model", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.cell("Trainer", "evaluation")
@pytest.mark.cell("BFTTrainer", "evaluation")
@BOTH
def test_metrics_and_predictions_get_the_logits_of_the_unpatched_model(tmp_path, kind, model):
    own, ours = (evaluated(tmp_path, k, model, compute_metrics=metrics) for k in ("trainer", kind))
    want, got = own.predict(data()), ours.predict(data())
    assert got.predictions.shape == (6, LENGTH, V)
    np.testing.assert_array_equal(got.predictions, want.predictions)
    np.testing.assert_array_equal(got.label_ids, want.label_ids)
    assert ours.evaluate()["eval_mean"] == own.evaluate()["eval_mean"]
    assert_close(got.metrics["test_loss"], want.metrics["test_loss"])


@pytest.mark.parametrize("kind", ["trainer", "patched", "bft"])
def test_logits_are_handed_over_batch_by_batch_and_do_not_stay(tmp_path, kind, caplog):
    shapes = []

    def preprocess(logits, labels):
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (V,)]
        assert len({o.untyped_storage().data_ptr() for o in alive}) <= 1
        shapes.append((tuple(logits.shape), tuple(labels.shape)))
        return logits.argmax(-1)

    reduce = {"compute_metrics": metrics, "preprocess_logits_for_metrics": preprocess}
    trainer = evaluated(tmp_path, kind, **reduce)
    with caplog.at_level(logging.WARNING, "bft.integrations"):
        assert trainer.evaluate()["eval_mean"] > 0
    assert shapes == [((B, LENGTH, V), (B, LENGTH))] * 3
    assert not [r for r in caplog.records if r.name.startswith("bft.integrations")]


def test_logits_that_are_kept_are_told_of_by_their_bytes(tmp_path, caplog):
    trainer = evaluated(tmp_path, "bft", compute_metrics=metrics)
    for _ in range(2):
        trainer.evaluate()
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("bft")]
    batch = B * LENGTH * V * 4
    assert f"{batch} bytes a batch, {3 * batch} in all" in told


@pytest.mark.parametrize("bf16", [False, True])
@BOTH
def test_without_metrics_no_logits_are_computed(tmp_path, monkeypatch, kind, bf16):
    trainer = evaluated(tmp_path, kind, settings={"bf16": bf16})
    trainer.evaluate()
    monkeypatch.setattr(DeferredLogits, "read", None)
    loss = trainer.evaluate()["eval_loss"]
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        if not bf16:  # whose head is copied
            step = measure_allocations(lambda: trainer.model(**batch))
            assert step.largest < B * LENGTH * V * 4
    monkeypatch.undo()
    assert trainer.predict(data()).metrics["test_loss"] == loss
    assert trainer.predict(data()).predictions.dtype == np.float32


@pytest.mark.cell("patch_model", "evaluation")
def test_deferred_logits_are_a_tensor_to_whoever_reads_them():
    model, batch = patch_model(tiny("LlamaForCausalLM"), SFT).eval(), rows()
    assert model(**batch).logits is None  # with gradients
    with torch.no_grad():
        want = model(input_ids=batch["input_ids"]).logits
        outputs = model(**batch)
        logits = outputs.logits
        assert (logits.shape, logits.dtype, logits.dim()) == (want.shape, want.dtype, 3)
        assert logits._numbers is None
        for read in (logits.detach(), torch.cat([logits]), copy.deepcopy(logits), logits[:]):
            assert type(read) is torch.Tensor
            assert torch.equal(read, want)
        assert outputs.to_tuple()[1] is logits
        assert np.array_equal(logits.numpy(), want.numpy())
        with torch.autocast("cpu", torch.bfloat16):
            narrow, late = model(input_ids=batch["input_ids"]).logits, model(**batch).logits
        assert torch.equal(late + 0, narrow.float())

        late = model(**batch).logits
        model.lm_head.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"^logits: the head's weight has changed since"):
            late.sum()

"""The loop: it learns, splits of a step agree, and what it saves gives its own numbers."""

import functools
import itertools
import json
import logging
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft import held_out as held_out_module
from bft import loss as loss_module
from bft import train as train_module
from bft.checkpoint import CheckpointError
from bft.data import AnswerDataset, Collator, StepBatches, collate_packed
from bft.evaluate import evaluate
from bft.loss import HeadLoss
from bft.patch import patch_model
from bft.records import read_jsonl
from bft.train import train, training_step
from bft_kernels.settings import SCHEMES
from tests.support.batches import assert_gradients, gradients_of
from tests.support.runs import metrics, on_two_processes, run_python, unevaluated


def parameters(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_learns_and_saves_a_model_that_loads(config, precision):
    how = {"eval_every": 20, "tensorboard": True, "mixed_precision": precision}
    how |= {"gradient_checkpointing": precision == "bf16"}
    result = train(replace(config, steps=40, **how))
    assert [row["step"] for row in result.evaluations] == [0, 20, 40]
    assert result.evaluations[-1]["nll"] < result.evaluations[0]["nll"] - 1
    assert len(result.history) == len(metrics(config.output_dir, "train")) == 40
    assert list(result.model_dir.glob("*.safetensors"))
    assert list(config.output_dir.rglob("events.out.tfevents*"))
    model = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = AutoTokenizer.from_pretrained(result.model_dir)("What", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]


WEIGHTS = [0.3, None, -2.0, 0.0, 1.5]  # of one record after the other


@pytest.mark.cell("bft train", "loss", "gradient", "accumulation", "packing")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("normalize", "weights"), [("sequence", [None]), ("token", [None]), ("sequence", WEIGHTS)]
)
def test_splits_of_a_step_give_one_gradient(
    fresh_accelerator, model_dir, data_file, scheme, normalize, weights
):
    """8 documents at once, in 4 micro-batches, packed: the same loss and gradients, float64."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    records = zip(read_jsonl(data_file), itertools.cycle(weights), strict=False)
    dataset = AnswerDataset([replace(record, weight=w) for record, w in records], tokenizer)
    results = []
    for batch_size, accumulation, packed in ((8, 1, False), (2, 4, False), (8, 1, True), (1, 8, 1)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
        loss = HeadLoss(scheme=scheme, window=6, normalize=normalize)
        patch_model(model, loss)
        batches = StepBatches(len(dataset), batch_size=batch_size, accumulation=accumulation)
        batches.start(0, 1)
        collate = collate_packed if packed else Collator.of(tokenizer)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
        values = training_step(Accelerator(cpu=True), model, loss, list(loader))
        results.append((values["loss"], values["labelled"], gradients_of(model)))
    for loss, labelled, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-9)
        assert labelled == results[0][1]
        assert_gradients(gradients, results[0][2])


def test_window_auto_is_an_eighth_of_the_median_answer(config, flags, caplog):
    """It is a number in what the run leaves, and both resume it."""
    config = unevaluated(config, steps=2, save_every=1, window="auto")
    with caplog.at_level(logging.INFO):
        before = train(config).history
    lengths = AnswerDataset(
        read_jsonl(config.train_file), AutoTokenizer.from_pretrained(config.model)
    )
    number = round(statistics.median(example.labelled for example in lengths.examples) / 8)
    assert number == lengths.auto_window() > 1
    assert f"window auto: {number} labelled tokens" in caplog.text
    saved = yaml.safe_load((config.output_dir / "config.yaml").read_text(encoding="utf-8"))
    assert saved["window"] == number
    for window in ("auto", number):
        shutil.rmtree(config.output_dir / "checkpoints" / "step-0000002")
        again = train(replace(config, window=window, resume=True)).history
        assert [row["loss"] for row in again] == [row["loss"] for row in before]
    with pytest.raises(CheckpointError, match=f"window: saved {number}, given {number + 1}"):
        train(replace(config, window=number + 1, resume=True))


def test_targets_are_made_once(fresh_accelerator, model_dir, data_file, monkeypatch):
    """The trainer counts with them, and hands them on to the patched model."""
    made = []
    for name in ("shift_labels", "cu_seqlens_from_position_ids"):
        original = getattr(loss_module, name)
        spy = functools.partial(lambda own, *args: made.append(own) or own(*args), original)
        monkeypatch.setattr(loss_module, name, spy)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    loss = HeadLoss(window=6)
    patch_model(model, loss)
    examples = AnswerDataset(read_jsonl(data_file), AutoTokenizer.from_pretrained(model_dir))
    batches = [collate_packed([examples[i], examples[i + 1]]) for i in (0, 2)]
    training_step(Accelerator(cpu=True), model, loss, batches)
    assert len(made) == 2 * len(batches)


def test_files_are_read_once(config, before_call):
    """The training file is a pipe, and the held-out one is gone after the first step."""
    held_out = Path(shutil.copy(config.eval_file, config.output_dir.parent / "held-out.jsonl"))
    before_call(train_module, "training_step", 1, lambda *_: held_out.unlink())
    reads, writes = os.pipe()
    os.write(writes, config.train_file.read_bytes())
    os.close(writes)
    result = train(replace(config, train_file=Path(f"/dev/fd/{reads}"), eval_file=held_out))
    os.close(reads)
    usual = train(replace(config, output_dir=config.output_dir / "usual"))
    for ours, other in zip(result.evaluations, usual.evaluations, strict=True):
        assert (ours["nll"], ours["majority_answer"]) == (other["nll"], other["majority_answer"])


def test_the_model_is_written_before_its_last_evaluation(config, before_call):
    before_call(held_out_module, "evaluate", 2, MemoryError)
    with pytest.raises(MemoryError):
        train(config)
    assert AutoModelForCausalLM.from_pretrained(config.output_dir / "model").num_parameters() > 0


def test_lora_trains_the_adapter_only(config):
    result = train(replace(config, lora_rank=4, steps=3))
    before, after = parameters(Path(config.model)), parameters(result.model_dir)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not changed & {"model.embed_tokens.weight", "lm_head.weight"}
    assert (result.model_dir / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_two_processes_train_like_one(config, flags, normalize):
    """Each rank takes half of every step's documents; parameters end up the same."""
    config = unevaluated(config, steps=4, normalize=normalize, max_grad_norm=0.0)
    alone = train(replace(config, output_dir=config.output_dir / "one"))
    halves = replace(config, batch_size=2, output_dir=config.output_dir / "two")
    how = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run_python(*on_two_processes(*flags(halves)), **how)
    ours = parameters(halves.output_dir / "model")
    assert_close(ours, parameters(alone.model_dir), atol=2e-6, rtol=0)
    rows = metrics(halves.output_dir)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone.history])


# --- what is loaded from a run's folder gives the numbers of its last evaluation -----------------


@pytest.fixture(scope="module")
def models(checkpoint_of, tmp_path_factory):
    """Tied, untied, both with a vocabulary resized to one with rows to spare, and a GPT-2."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        made[name] = checkpoint_of(folder / name, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(made[name])
        torch.manual_seed(1)
        model.resize_token_embeddings(420, pad_to_multiple_of=64)
        made[f"{name}-resized"] = checkpoint_of(folder / f"{name}-resized", model)
    return made | {"gpt2": checkpoint_of(folder / "gpt2", "GPT2LMHeadModel")}


def nll(model, config):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    records = read_jsonl(config.eval_file, limit=config.eval_limit)
    return evaluate(model, tokenizer, records, progress=False).nll


@pytest.mark.cell("bft train", "evaluation", "save")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (name, targets)
        for name in ("tied", "untied", "tied-resized", "untied-resized")
        for targets in ((), ("all-linear",), ("embed_tokens", "q_proj"), ("lm_head", "q_proj"))
    ]
    + [("tied", ("embed_tokens", "lm_head")), ("untied", ("all-linear", "lm_head"))]
    + [("gpt2", ()), ("gpt2", ("c_attn", "wte"))],
)
def test_folder_and_adapter_give_the_last_evaluation(config, models, name, targets):
    config = replace(config, model=str(models[name]), learning_rate=3e-2, steps=8)
    if targets:
        config = replace(config, lora_rank=4, lora_targets=targets)
    result = train(config)
    before, after = (result.evaluations[place]["nll"] for place in (0, -1))
    assert abs(after - before) > 0.05  # far enough for another model to show
    written = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert nll(written, config) == pytest.approx(after, abs=2e-5)
    if targets:
        base = AutoModelForCausalLM.from_pretrained(config.model)
        adapted = PeftModel.from_pretrained(base, result.model_dir / "adapter")
        assert nll(adapted, config) == pytest.approx(after, abs=2e-5)


def test_only_what_learned_apart_is_untied(config, models, caplog):
    config = unevaluated(config, model=str(models["tied"]), lora_rank=4, steps=2)
    for targets, tied in ((("q_proj",), True), (("embed_tokens",), False), (("lm_head",), False)):
        folder = config.output_dir / targets[0]
        with caplog.at_level(logging.WARNING):
            written = train(replace(config, lora_targets=targets, output_dir=folder)).model_dir
        assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is tied
        weights = load_file(written / "model.safetensors")
        assert ("lm_head.weight" in weights) is not tied
        assert ("tie_word_embeddings=false" in caplog.text) is not tied


def test_bfloat16_parameters_differ_by_one_rounding(config, models):
    """The adapter is added in float32 and rounded once, to the type that the base is loaded in."""
    config = replace(config, dtype="bfloat16", learning_rate=1e-2, steps=8)
    for name, targets in (("untied", ()), ("tied", ("embed_tokens", "q_proj"))):
        lora = {"lora_rank": 4, "lora_targets": targets} if targets else {}
        folders = {"model": str(models[name]), "output_dir": config.output_dir / name}
        config = replace(config, **folders, **lora)
        result = train(config)
        written = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
        assert written.dtype == torch.bfloat16
        last = result.evaluations[-1]["nll"]
        assert nll(written, config) == pytest.approx(last, abs=2e-2 if targets else 1e-6)

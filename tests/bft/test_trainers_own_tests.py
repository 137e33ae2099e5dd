"""Tests of TRL and transformers, by their names, of loss and packing with our trainers.

Theirs load models, tokenizers and data from the hub; here are random models and a local tokenizer.
They assert what theirs do: what trains has changed, the rest has not. docs/integrations.md counts.
"""

import itertools
import math
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import peft
import pytest
import torch
import transformers as hf
import trl

from bft.integrations.transformers import BFTTrainer
from bft.integrations.trl import BFTSFTTrainer
from bft.loss import IGNORE
from tests.bft.test_integrations import TOKEN
from tests.bft.test_integrations_trl import CHAT, PAIRS, TEMPLATE, TEXT, assert_same_logs
from tests.support.batches import assert_gradients, gradients_of, rows
from tests.support.models import tiny
from tests.support.runs import one_step

pytestmark = pytest.mark.slow

LORA, CAUSAL = peft.LoraConfig(), {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
SIZES = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "head_dim": 8}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "mamba_num_heads": 4}
SIZES |= {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
SPOKEN = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHAT]
TURNS = [
    {**row, "completion": [*row["completion"], *row["prompt"][:1], *row["completion"]]}
    for row in SPOKEN
]
OTHER = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
    for row in CHAT
]
IDS = [{"input_ids": [5 + n % 7, 9, 11, 30 + n]} for n in range(8)]
REENTRANT = {
    f"{how}": {} if how is None else {"gradient_checkpointing_kwargs": {"use_reentrant": how}}
    for how in (None, True, False)
}
PEFT = {
    "test_train_dense_with_peft_config_lora": LORA,
    "test_train_with_peft_config_prompt_tuning-prompt": peft.PromptTuningConfig(**CAUSAL),
    "test_train_with_peft_config_prompt_tuning-prefix": peft.PrefixTuningConfig(**CAUSAL),
    "test_train_with_peft_config_prompt_tuning-encoder": peft.PromptEncoderConfig(**CAUSAL),
}
MODELS = (
    *("Cohere2ForCausalLM", "FalconMambaForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM"),
    *("Lfm2ForCausalLM", "NemotronHForCausalLM", "Olmo3ForCausalLM", "Qwen2ForCausalLM"),
    "Qwen3MoeForCausalLM",
)
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
CASES = {
    **{f"test_train-{model}": {"model": model} for model in MODELS},
    "test_train_dataset_format-text": {},
    "test_train_dataset_format-chat": {"data": CHAT},
    "test_train_dataset_format-pairs": {"data": PAIRS},
    "test_train_dataset_format-spoken": {"data": SPOKEN},
    "test_train_dft_loss": {"options": {"scheme": "dft"}, "learning_rate": 0.1, **STEPS},
    "test_train_with_formatting_func": {
        "data": [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS],
        "options": {"formatting_func": lambda row: f"Q: {row['question']}A: {row['answer']}"},
    },
    "test_train_model_dtype": {"dtype": torch.float16, "learning_rate": 0.1},
    **{
        name: {"options": {"peft_config": config}, "gradient_checkpointing": config is LORA}
        for name, config in PEFT.items()
    },
    "test_train_moe_with_peft_config": {
        "model": "GptOssForCausalLM",
        "options": {
            "peft_config": peft.LoraConfig(
                target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
            )
        },
    },
    "test_train_peft_model": {"wrap": LORA},
    "test_prompt_tuning_peft_model": {
        "wrap": peft.PromptEncoderConfig(**CAUSAL),
        "gradient_checkpointing": False,
    },
    **{f"test_train_with_gradient_checkpointing-{n}": how for n, how in REENTRANT.items()},
    **{
        f"test_train_with_peft_config_and_gradient_checkpointing-{n}": {
            "options": {"peft_config": LORA},
            **how,
        }
        for n, how in REENTRANT.items()
    },
    "test_train_with_non_chatml_conversational_data": {"data": OTHER},
    "test_train_with_pretokenized_data": {"data": IDS},
    "test_train_with_iterable_dataset": {"stream": True},
    "test_train_padding_free": {"padding_free": True, "max_length": None},
    "test_train_packing-bfd": {"packing": True, "max_length": 20},
    "test_train_packing-wrapped": {
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 20,
    },
    "test_train_assistant_only": {"data": CHAT, "assistant_only_loss": True},
    "test_train_completion_only": {"data": SPOKEN, "completion_only_loss": True},
    "test_train_assistant_only_and_completion_only": {
        "data": TURNS,
        "assistant_only_loss": True,
        "completion_only_loss": True,
    },
    "test_train_assistant_only_iterable_dataset": {
        "data": CHAT,
        "stream": True,
        "assistant_only_loss": True,
    },
    "test_train_with_metric_for_best_model": {
        "metric_for_best_model": "eval_mean_token_accuracy",
        **STEPS,
    },
    "test_train_with_compute_metrics": {
        "options": {"compute_metrics": lambda found: {"v": found.predictions.shape[-1]}},
        **STEPS,
    },
    "test_train_with_multiple_eval_dataset": {"parts": ("data1", "data2"), **STEPS},
}


def own(*args, scheme, normalize, **rest):
    """TRL's trainer, with the loss that these fields are."""
    args[1].loss_type = {"sft": "nll"}.get(scheme, scheme)
    return trl.SFTTrainer(*args, **rest)


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer of TRL with our loss, that of TRL's by default."""
    tokenizer.chat_template = TEMPLATE

    def build(
        model="Qwen2ForCausalLM",
        data=TEXT,
        options=None,
        stream=False,
        parts=(),
        wrap=None,
        kind=BFTSFTTrainer,
        dtype=torch.float32,
        **settings,
    ):
        model = tiny(model, vocab_size=len(tokenizer), dtype=dtype, **SIZES)
        found = datasets.Dataset.from_list(data)
        args = trl.SFTConfig(**one_step(tmp_path) | {"max_steps": 2, "logging_steps": 1} | settings)
        return kind(
            peft.get_peft_model(model, wrap) if wrap else model,
            args,
            train_dataset=found.to_iterable_dataset() if stream else found,
            eval_dataset=dict.fromkeys(parts, found) if parts else found,
            processing_class=tokenizer,
            **TOKEN | (options or {}),
        )

    return build


def assert_trains(trainer):
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    for name, (value, trains) in before.items():
        assert torch.equal(value, trainer.model.get_parameter(name)) != trains, name


@pytest.mark.parametrize("name", CASES)
def test_of_trl(make, name):
    trainer = make(**CASES[name])
    assert_trains(trainer)
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"entropy", "mean_token_accuracy", "nll", "confidence"} <= logged
    want = {"metrics": {"eval_v"}, "multiple": {"eval_data1_loss", "eval_data2_loss"}}
    assert all(keys <= logged for part, keys in want.items() if part in name)


# Two steps of rate 0.1 in float16 part ways.
@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in CASES if "dtype" not in name])
def test_logs_are_those_of_trl(make, name):
    trainers = []
    for kind in (BFTSFTTrainer, own):
        torch.manual_seed(0)
        trainers.append(make(kind=kind, **{"bf16": False} | CASES[name]))
        torch.manual_seed(0)
        trainers[-1].train()
    assert_same_logs(*trainers, rel=2e-4)  # in float32


@pytest.mark.parametrize("eval_packing", [None, False], ids=["eval", "only_train"])
def test_eval_packing(make, eval_packing):
    trainer = make(packing=True, max_length=64, eval_packing=eval_packing)
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    assert sum(map(len, train["seq_lengths"])) == len(TEXT) > len(train)
    assert max(map(sum, train["seq_lengths"])) <= 64
    assert (len(held_out) == len(train)) == (eval_packing is None)
    losses = [trainer.evaluate()["eval_loss"], make().evaluate()["eval_loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # means of batches, in bfloat16


def test_packing_carries_labels(make):
    trainer = make(data=PAIRS, packing=True, max_length=64)
    assert {"input_ids", "labels", "seq_lengths"} == set(trainer.train_dataset.column_names)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert [len(row) for row in labels] == [len(row["input_ids"]) for row in trainer.train_dataset]
    assert {IGNORE} < set(itertools.chain(*labels))


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "iterable"])
@pytest.mark.parametrize("kind", ["one", "dict", "DatasetDict"])
def test_evaluate_with_eval_dataset(make, kind, stream):
    found = datasets.Dataset.from_list(TEXT[:2])
    found = found.to_iterable_dataset() if stream else found
    both = {"data1": found, "data2": found}
    if kind == "DatasetDict":
        both = (datasets.IterableDatasetDict if stream else datasets.DatasetDict)(both)
    metrics = make().evaluate(found if kind == "one" else both)
    names = [""] if kind == "one" else ["data1_", "data2_"]
    assert all(math.isfinite(metrics[f"eval_{n}{v}"]) for n in names for v in ("loss", "nll"))


def test_predict_returns_logits(make, tokenizer):
    trainer = make()
    assert trainer.predict(trainer.train_dataset).predictions.shape[-1] == len(tokenizer)


def test_peft_init_is_seeded(make):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(make(options={"peft_config": LORA}).model)
    adapters = [{n: p for n, p in m.named_parameters() if "lora_A" in n} for m in models]
    torch.testing.assert_close(*adapters, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "coefficient"),
    [
        ("Qwen3MoeForCausalLM", 0.001),
        ("Qwen3MoeForCausalLM", 0.5),
        ("DeepseekV3ForCausalLM", 0.0),
        ("Qwen2ForCausalLM", 0.0),
    ],
)
def test_router_aux_loss_coef(make, model, coefficient):
    given = {"router_aux_loss_coef": 0.5} if coefficient == 0.5 else {}
    trainer = make(model, **given)
    assert trainer.router_aux_loss_coef == coefficient
    assert trainer.aux_loss_enabled == (coefficient > 0)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        make(router_aux_loss_coef=0.5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("compute_loss_func", {"options": {"compute_loss_func": lambda *a, **k: None}}),
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
        ("max_length", {"padding_free": True, "max_length": 16}),
    ],
)
def test_arguments_that_are_refused(make, name, wrong):
    """As with ``test_train_with_compute_loss_func``, which runs in TRL."""
    with pytest.raises(ValueError, match=name):
        make(**wrong)


# --- transformers --------------------------------------------------------------------------------


def of_transformers(folder, model, options=None, **settings):
    args = hf.TrainingArguments(**one_step(folder) | settings)
    batch = rows(16)
    data = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return BFTTrainer(model, args, train_dataset=data, eval_dataset=data, **TOKEN | (options or {}))


def gpt2():
    return tiny("GPT2LMHeadModel")


class Batched:
    """A mean of the logits over all batches."""

    def __init__(self):
        self.values = []

    def __call__(self, found, compute_result):
        self.values.append(float(found.predictions.mean()))
        return {"mean": sum(self.values) / len(self.values)} if compute_result else {}


@pytest.mark.parametrize(
    "forward",
    [
        {},
        {"return_dict": False},
        {"return_dict": False, "output_router_logits": None},
        {"output_router_logits": False},
        {"return_dict": False, "output_router_logits": False},
    ],
)
@pytest.mark.parametrize("coefficient", [0.01, 0.0, 0.07, "dense"])
def test_model_loss_matches_full_batch(tmp_path, coefficient, forward):
    """Of two ranks; ``test_uses_model_auxiliary_coefficient``, ``test_dense_model`` and
    ``test_tensor_parallel_ranks_do_not_increase_loss_scale``, too.
    """
    kind = "LlamaForCausalLM" if coefficient == "dense" else "Qwen3MoeForCausalLM"
    own = {"num_experts": 4, "num_experts_per_tok": 1, "output_router_logits": True}
    model = tiny(kind, **({} if coefficient == "dense" else own))
    model.router_aux_loss_coef = coefficient
    trainer = of_transformers(tmp_path, model)
    ids = rows(4, 9)["input_ids"].repeat_interleave(2, dim=0)
    found = []
    for ranks, tensor_parallel in ((1, 1), (2, 1), (2, 2)):
        batch = {"input_ids": ids[::ranks], "labels": ids[::ranks]}
        known = {"num_processes": ranks * tensor_parallel}
        known["parallelism_config"] = SimpleNamespace(tp_size=tensor_parallel, sp_backend=None)
        with patch.multiple(trainer.accelerator.state, **known):
            loss = trainer.compute_loss(model, batch | forward, num_items_in_batch=64)
        found.append((loss.detach(), gradients_of(model, loss)))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        assert_gradients(gradients, found[0][1], 1e-5)


@pytest.mark.parametrize("average", [True, False], ids=["no_token_count", "averaging_disabled"])
def test_unscaled_model_loss(tmp_path, average):
    trainer = of_transformers(tmp_path, gpt2(), average_tokens_across_devices=average)
    batch, items = rows(2), None if average else 64
    want = trainer.model.eval()(**batch, num_items=items).loss
    with patch.object(trainer.accelerator.state, "num_processes", 2):
        loss, outputs = trainer.compute_loss(trainer.model, batch, True, items)
    torch.testing.assert_close((loss, outputs.loss), (want, want))


def test_gradient_accumulation_loss_alignment_with_model_loss(tmp_path):
    logs = []
    for cut in ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 2}):
        settings = {"per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 5} | cut
        trainer = of_transformers(tmp_path, tiny("LlamaForCausalLM"), **settings)
        trainer.train()
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_train_and_predict_loss_parity(tmp_path):
    trainer = of_transformers(tmp_path, tiny("LlamaForCausalLM"))
    batch = rows(4)
    trainer.create_optimizer()
    train = trainer.training_step(trainer.model, batch, torch.tensor(44))
    predicted = trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=True)[0]
    torch.testing.assert_close(train, predicted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [None, 0.4], ids=["gradient_checkpointing", "neftune"])
def test_settings_of_training(tmp_path, alpha):
    settings = {"neftune_noise_alpha": alpha, "gradient_checkpointing": alpha is None}
    trainer = of_transformers(tmp_path, tiny("LlamaForCausalLM"), **settings)
    assert_trains(trainer)
    assert not (alpha and trainer.model.get_input_embeddings()._forward_hooks)


@pytest.mark.parametrize("keep", [True, False])
def test_logging_inf_nan_filter(tmp_path, keep):
    settings = {"learning_rate": 1e9, "logging_steps": 5, "max_steps": 15}
    trainer = of_transformers(tmp_path, gpt2(), logging_nan_inf_filter=keep, **settings)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(map(math.isfinite, logged)) == keep


@pytest.mark.parametrize("setting", ["batch_eval_metrics", "eval_use_gather_object"])
def test_evaluate_and_predict(tmp_path, setting):
    model = tiny("LlamaForCausalLM")
    want = float(model.eval()(rows(16)["input_ids"]).logits.mean())
    batched = setting == "batch_eval_metrics"
    metrics = Batched() if batched else lambda found: {"mean": float(found.predictions.mean())}
    options = {"compute_metrics": metrics}
    trainer = of_transformers(tmp_path, model, options, **{setting: True})
    assert trainer.evaluate()["eval_mean"] == pytest.approx(want, abs=1e-6)
    assert trainer.predict(trainer.eval_dataset).predictions.shape[-1] == 61

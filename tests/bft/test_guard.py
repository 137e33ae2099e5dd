"""A patched model in training: whatever passes by the fused loss raises and names the way out."""

import copy
import io
import logging
from types import MethodType

import datasets
import peft
import pytest
import torch
import transformers as hf
import trl
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bft.guard import Bypassed
from bft.head import UnsupportedModel
from bft.patch import fused_loss, last_stats, patch_model, unpatch_model, use_loss
from tests.support.batches import SFT, rows
from tests.support.models import tiny
from tests.support.runs import one_step

MODELS = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
    "MambaForCausalLM",
    "BartForCausalLM",
    "BertForMaskedLM",
]


def llama(**settings):
    return tiny("LlamaForCausalLM", **settings)


def own_loss(model, input_ids, labels, **_):
    """What a trainer does that knows better: body and head by itself."""
    hidden = model.base_model(input_ids=input_ids)[0]
    logits = hidden @ model.get_output_embeddings().weight.T
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


# --- what raises, and what does not --------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_body_and_head_do_not_train_outside_of_the_patch(name):
    model, batch = patch_model(tiny(name), SFT), rows()
    with pytest.raises(Bypassed, match=r"^model: the body of the patched .* outside .*unpatch"):
        own_loss(model, **batch)
    with pytest.raises(Bypassed, match=r"^model: the head of the patched"):
        model.get_output_embeddings()(torch.zeros(1, 2, 16))
    with pytest.raises(Bypassed, match=r"^labels: got none in a training call.*fused_loss"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="labels: got shape"):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, :-1])
    with pytest.raises(Bypassed):  # a call that failed does not open the way past
        own_loss(model, **batch)

    model(**batch).loss.backward()  # the patched call is none of these
    with torch.no_grad():
        own_loss(model, **batch)
        assert model(input_ids=batch["input_ids"]).logits is not None
    own_loss(model.eval(), **batch).backward()
    assert model(input_ids=batch["input_ids"]).logits is not None
    model.train()
    unpatch_model(model)
    own_loss(model, **batch).backward()
    model(input_ids=batch["input_ids"]).logits.sum().backward()


def test_training_past_the_patch_may_be_allowed():
    model, batch = patch_model(llama(), SFT, allow_unlabelled=True), rows()
    own_loss(model, **batch).backward()
    model(input_ids=batch["input_ids"]).logits.sum().backward()
    assert model(**batch).logits is None


def test_fused_loss_and_generation_need_no_labels_in_the_model():
    model, batch = llama(), rows()
    value, _ = fused_loss(model, batch, SFT)
    own_loss(model, **batch).backward()  # not patched any more
    patch_model(model, SFT)
    torch.testing.assert_close(fused_loss(model, batch, SFT)[0], value)
    with use_loss(model, SFT), pytest.raises(Bypassed):
        own_loss(model, **batch)
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)


def test_recomputation_in_the_backward_is_no_bypass():
    model, batch = patch_model(llama(), SFT), rows()
    model(**batch).loss.backward()
    want = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.model = checkpoint_wrapper(model.model)  # runs all of the body in the backward again
    runs = []
    model.model.register_forward_pre_hook(lambda *_: runs.append("forward"))
    model.model._checkpoint_wrapped_module.register_forward_pre_hook(lambda *_: runs.append("body"))
    model(**batch).loss.backward()
    assert runs == ["forward", "body", "body"]
    torch.testing.assert_close(model.lm_head.weight.grad, want)


def test_the_head_that_a_peft_model_freezes_is_guarded_too():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model, batch = peft.get_peft_model(patch_model(llama(), SFT), config), rows()
    model(**batch).loss.backward()
    with pytest.raises(Bypassed, match="labels: got none"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(Bypassed, match="body"):
        own_loss(model.get_base_model(), **batch)


# --- trainers ------------------------------------------------------------------------------------


def test_a_forward_put_over_the_patch_is_named():
    model, batch = patch_model(llama(), SFT), rows()
    model.forward = MethodType(own_loss, model)
    with pytest.raises(Bypassed, match=r"test_guard.own_loss took its place after patch_model"):
        model(**batch)


@pytest.fixture
def trainer(tmp_path):
    """A Trainer of a patched model."""

    def make(loss=None, more=(), **settings):
        arguments = hf.TrainingArguments(**one_step(tmp_path), **settings)
        data = [{k: v[0] for k, v in {**rows(), **dict(more)}.items()}] * 2
        sets = {"train_dataset": data, "eval_dataset": data}
        return hf.Trainer(patch_model(llama(), SFT), arguments, compute_loss_func=loss, **sets)

    return make


def test_a_trainer_hands_token_weights_on(trainer):
    weight = {"token_weight": torch.full(rows()["labels"].shape, 0.5)}
    plain, weighted = (trainer(more=more).train().training_loss for more in ((), weight))
    assert weighted == pytest.approx(plain / 2, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"loss": lambda *a, **k: a[0].logits.sum()}],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_a_trainer_that_takes_the_labels_out_raises(settings, trainer):
    with pytest.raises(Bypassed, match="label_smoothing_factor and compute_loss_func"):
        trainer(**settings).train()


def test_a_trainer_that_passes_labels_trains_and_is_told_what_its_logits_take(trainer, caplog):
    made = trainer()
    before = made.model.lm_head.weight.detach().clone()
    made.train()
    assert not torch.equal(made.model.lm_head.weight, before)
    assert last_stats(made.model) is not None
    made.evaluate()
    with caplog.at_level(logging.WARNING):
        predicted = made.predict(made.eval_dataset).predictions
    (told,) = [record.getMessage() for record in caplog.records if "logits" in record.getMessage()]
    assert f"{predicted.nbytes} bytes" in told
    assert "preprocess_logits_for_metrics" in told


@pytest.fixture
def sft_trainer(tokenizer, tmp_path):
    """TRL's trainer of a model, with ``patched`` a patched one."""

    def make(patched=False, kind=trl.SFTTrainer, **settings):
        model = llama(vocab_size=len(tokenizer))
        text = [{"text": "What does the heart do? It pumps the blood."}] * 4
        return kind(
            patch_model(model, SFT) if patched else model,
            trl.SFTConfig(**one_step(tmp_path), bf16=False, max_length=32, **settings),
            train_dataset=datasets.Dataset.from_list(text),
            processing_class=tokenizer,
        )

    return make


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}], ids=["nll", "dft"])
def test_sft_trainer_does_not_go_past_the_patch(settings, sft_trainer):
    with pytest.raises(Bypassed, match=r"trl\..*took its place after patch_model"):
        sft_trainer(patched=True, **settings).train()


def test_a_patch_over_sft_trainers_forward_is_refused(sft_trainer):
    made = sft_trainer()
    patch_model(made.model, SFT)
    with pytest.raises(UnsupportedModel, match=r"trl\..*took the place of forward before"):
        made.train()


def test_sft_trainer_trains_with_a_loss_of_compute_loss(sft_trainer):
    """What the messages advise."""

    class Fused(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = fused_loss(model, inputs, SFT)[0]
            return (loss, None) if return_outputs else loss

    expected = sft_trainer().train().training_loss
    got = sft_trainer(kind=Fused).train().training_loss
    assert got == pytest.approx(expected, rel=1e-5)


# --- copies --------------------------------------------------------------------------------------


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_whole])
def test_copies_and_pickles_are_patched_and_guarded_on_their_own(copied):
    model, batch = patch_model(llama(), SFT), rows()
    want = model(**batch).loss
    twin = copied(model)
    torch.testing.assert_close(twin(**batch).loss, want, rtol=0, atol=0)
    assert last_stats(twin).nll is not last_stats(model).nll
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    assert twin(**batch).loss != want
    with pytest.raises(Bypassed):
        own_loss(twin, **batch)
    unpatch_model(twin)
    own_loss(twin, **batch)
    with pytest.raises(Bypassed):
        own_loss(model, **batch)
    torch.testing.assert_close(model(**batch).loss, want, rtol=0, atol=0)


def test_a_copy_of_the_body_alone_is_nobodys():
    model, batch = patch_model(llama(), SFT), rows()
    body = copy.deepcopy(model.model)
    body(input_ids=batch["input_ids"]).last_hidden_state.sum().backward()
    with pytest.raises(Bypassed):
        own_loss(model, **batch)


def test_a_head_that_took_the_old_ones_place_is_guarded():
    model, batch = patch_model(llama(), SFT), rows()
    model.resize_token_embeddings(70)
    model(**batch).loss.backward()
    with pytest.raises(Bypassed, match="head"):
        model.lm_head(torch.zeros(1, 2, 16))
    unpatch_model(model)
    model.lm_head(torch.zeros(1, 2, 16))

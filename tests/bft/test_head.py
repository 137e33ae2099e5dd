"""Finding a model's head; measuring what the model does to its logits and to its labels."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from bft.head import (
    LogitTransform,
    UnsupportedModel,
    causal_lm,
    find_head,
    verify_linear,
)
from bft.loss import IGNORE
from bft.measure import probe, read_transform
from bft.patch import last_stats, patch_model, unpatch_model, use_loss
from bft.train import training_step
from tests.support.batches import SFT, rows
from tests.support.models import tiny, tiny_config


def llama(kind=transformers.LlamaForCausalLM):
    torch.manual_seed(0)
    return kind(tiny_config("LlamaConfig"))


class Edited(transformers.LlamaForCausalLM):
    """A model that does something of its own to its logits."""

    edit = None  # a function of the logits

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = type(self).edit(output.logits)
        return output


BATCH = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}


def edited(edit):
    return llama(type("Edited", (Edited,), {"edit": staticmethod(edit)}))


# --- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda y: y, LogitTransform()),
        (lambda y: y.float(), LogitTransform()),
        (lambda y: y.bfloat16(), LogitTransform()),
        (lambda y: y * 0.0625, LogitTransform(None, 16.0)),
        (lambda y: y / 6.0, LogitTransform(None, 6.0)),
        (lambda y: 30.0 * torch.tanh(y / 30.0), LogitTransform(30.0, 1.0)),
        (lambda y: y.div_(30).tanh_().mul_(30), LogitTransform(30.0, 1.0)),
        (lambda y: 30.0 * torch.tanh(y.float() / 30.0), LogitTransform(30.0, 1.0)),
        (lambda y: 30.0 * torch.tanh(y / 30.0) * 0.5, LogitTransform(30.0, 2.0)),
        (lambda y: 30.0 * torch.tanh(y * 0.5 / 30.0), LogitTransform(60.0, 2.0)),
        (lambda y: 15.0 * torch.tanh(y / 7.5), LogitTransform(7.5, 0.5)),
    ],
)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1000])
def test_a_known_transform_is_read_off(edit, expected, vocabulary):
    sent = probe(vocabulary, torch.device("cpu"), torch.float64)
    got = read_transform(sent, edit(sent.clone()), "model")
    exact = edit(sent.clone()).dtype == torch.float64
    assert (got.softcap is None) == (expected.softcap is None)
    for a, b in zip(got, expected, strict=True):
        assert a == b or a == pytest.approx(b, rel=1e-15 if exact else 1e-7)


def mask(y):
    return y.index_fill(-1, torch.tensor([3, 5]), torch.finfo(y.dtype).min)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda y: y[..., :-1], r"turns logits \(1, 5, 61\) into \(1, 5, 60\)"),
        (lambda y: y + 0.1, "masks or adds to 61 of 61 entries"),
        (mask, "masks or adds to 2 of 61 entries"),
        (lambda y: y.log_softmax(-1), "masks or adds to 61 of 61"),
        (lambda y: -y, r"multiplies its logits by -1\.0"),
        (lambda y: y * 0, r"multiplies its logits by 0\.0"),
        (lambda y: y * torch.linspace(1, 2, 61), "changes 60 of 61 logits"),
        (lambda y: y.clamp(min=-5), "changes 61 of 61 logits"),
        (lambda y: y + 0.01 * y.roll(1, -1), "logits"),
        (lambda y: y * (1 + 1e-3 * y.abs().clamp(max=1)), "logits other than by LogitTransform"),
        (lambda y: y * torch.nan, "adds to 61 of 61"),
    ],
)
def test_any_other_is_refused_and_named(edit, message):
    model = patch_model(edited(edit), SFT)
    with pytest.raises(UnsupportedModel, match=message):
        model(**BATCH)
    with pytest.raises(UnsupportedModel, match="can only express softcap"):
        model(**BATCH)


# --- the head ------------------------------------------------------------------------------------


def test_wrappers_are_seen_through():
    model = llama()
    assert causal_lm(model) is model
    assert causal_lm(nn.DataParallel(model)) is model
    assert causal_lm(torch.compile(model)) is model
    with pytest.raises(UnsupportedModel, match=r"got Linear.*get_output_embeddings"):
        causal_lm(nn.Linear(2, 2))


@pytest.mark.cell("T5ForConditionalGeneration", "refused")
def test_models_without_a_head_are_refused():
    body = llama().model
    for found in (None, body.embed_tokens):
        body.get_output_embeddings = lambda found=found: found
        with pytest.raises(UnsupportedModel, match="LlamaModel has no output embedding"):
            find_head(body)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_head(tiny("T5ForConditionalGeneration"))


def test_heads_that_are_not_plain_are_refused():
    class Quantised(nn.Parameter):
        pass

    model = llama()
    for weight, says in (
        (Quantised(torch.zeros(61, 16)), r"weight of Linear.*quantised"),
        (torch.zeros(61, 16, dtype=torch.int8), r"Parameter of torch\.int8.*quantised"),
        (torch.zeros(61, 16).to(torch.float8_e4m3fn), r"weight of Linear.*quantised"),
        (torch.zeros(61, 16, 1), r"shape \(61, 16, 1\)"),
    ):
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=False)
        model.lm_head.weight = weight
        with pytest.raises(UnsupportedModel, match=says):
            patch_model(model, SFT)
    model.lm_head = nn.ReLU()
    with pytest.raises(UnsupportedModel, match="ReLU has no weight tensor"):
        patch_model(model, SFT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_head_passes_and_another_does_not(dtype):
    head = nn.Linear(512, 1000).to(dtype)
    hidden = torch.randn(3, 512).to(dtype)
    verify_linear(head, hidden, head.weight, head.bias)
    for own in (lambda h: head(h) * 1.02, lambda h: head(h)[None], lambda h: head(h)[:, :7]):
        with pytest.raises(UnsupportedModel, match="differs from hidden @ weight"):
            verify_linear(own, hidden, head.weight, head.bias)
    with pytest.raises(UnsupportedModel, match="differs from hidden @ weight"):
        verify_linear(head, hidden, head.weight, None)


def test_a_head_that_does_more_is_refused():
    class Normed(nn.Linear):
        def forward(self, hidden):
            return super().forward(nn.functional.normalize(hidden, dim=-1))

    model = llama()
    model.lm_head = Normed(16, 61, bias=False)
    with (
        pytest.raises(UnsupportedModel, match="its own forward differs"),
        use_loss(model, SFT),
    ):
        model(**BATCH)


def test_a_head_called_more_or_less_than_once_is_refused():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, **kwargs):
            super().forward(**kwargs)
            return super().forward(**kwargs)

    class Never(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            logits = hidden @ self.lm_head.weight.T
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    for kind, times in ((Twice, 2), (Never, 0)):
        model = patch_model(llama(kind), SFT)
        with pytest.raises(UnsupportedModel, match=f"called its head {times} times"):
            model(**BATCH)


# --- labels: shifted by the model's own loss, or not ----------------------------------------------

NOT_SHIFTED = {
    "BartForCausalLM": {"dropout": 0.0},
    "MBartForCausalLM": {},
    "PegasusForCausalLM": {},
    "BlenderbotForCausalLM": {},
    "MarianForCausalLM": {},
    "MvpForCausalLM": {},
    "PLBartForCausalLM": {},
    "BigBirdPegasusForCausalLM": {"attention_type": "original_full"},
    "TrOCRForCausalLM": {},
    "WhisperForCausalLM": {"suppress_tokens": []},
    "XLNetLMHeadModel": {},
    "CpmAntForCausalLM": {"dim_head": 8},
    "XLMWithLMHeadModel": {},
    "BertForMaskedLM": {},
    "RobertaForMaskedLM": {},
    "ModernBertForMaskedLM": {"cls_token_id": 1, "sep_token_id": 2},
}
SHIFTED = {
    "BertLMHeadModel": {"is_decoder": True},
    "RobertaForCausalLM": {"is_decoder": True},
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 8, "final_logit_softcapping": 0.3},
    "MixtralForCausalLM": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "BloomForCausalLM": {},
    "ProphetNetForCausalLM": {},
}


def build(name):
    model = tiny(name, **(NOT_SHIFTED | SHIFTED)[name]).eval()
    for parameter in model.parameters():  # so that one position's loss is not another's
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NOT_SHIFTED, *SHIFTED])
@torch.no_grad()
def test_the_loss_is_the_models_own_or_is_refused(name, dtype):
    model, batch = build(name).to(dtype), rows(ignored=3)
    want = model(**batch).loss.float()
    patch_model(model, SFT)
    if name == "ProphetNetForCausalLM":  # its loss wants the logits of all its streams
        with pytest.raises(UnsupportedModel, match="shift="):
            model(**batch)
        return
    got = model(**batch).loss
    assert model._fused_head.shift is (name in SHIFTED)
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=0)
    # Aligned labels mean the same to all of them.
    target = batch["labels"]
    model(input_ids=batch["input_ids"], shift_labels=target)
    nll = last_stats(model).nll
    logits = unpatch_model(model)(input_ids=batch["input_ids"], use_cache=False).logits
    kept = target != IGNORE
    want = torch.nn.functional.cross_entropy(logits[kept].float(), target[kept])
    rtol = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(nll[kept].mean(), want, rtol=rtol, atol=0)


class Own(transformers.LlamaForCausalLM):
    """A model with a loss of its own."""

    def forward(self, labels=None, **kwargs):
        output = super().forward(**kwargs)
        if labels is not None:
            output.loss = self.own(output.logits, labels, kwargs["input_ids"])
        return output


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda logits, labels, ids: logits.mean() * 0 + 3, r"computes 3 as its own loss.*shift="),
        (lambda logits, labels, ids: logits[ids != labels].sum(), r"could not be measured.*shift="),
    ],
    ids=["another loss", "a forward that fails"],
)
def test_an_alignment_that_cannot_be_measured_is_asked_for(own, message):
    kind, batch = type("Own", (Own,), {"own": staticmethod(own)}), rows()
    config = tiny_config("LlamaConfig")
    with pytest.raises(UnsupportedModel, match=message):
        patch_model(kind(config), SFT)(**batch)
    for shift in (True, False):
        model = patch_model(kind(config), SFT, shift=shift)
        model(**batch)
        last = batch["labels"][:, -1:] if not shift else torch.full((2, 1), IGNORE)
        assert torch.equal(last_stats(model).nll[:, -1:] == 0, last == IGNORE)


def test_a_failing_forward_shows_its_own_error():
    model, batch = patch_model(build("LlamaForCausalLM"), SFT), rows()
    with pytest.raises(IndexError, match="index out of range"):
        model(**{k: v + 61 for k, v in batch.items()})


@pytest.mark.parametrize("name", ["BartForCausalLM", "LlamaForCausalLM"])
def test_training_predicts_the_next_token_whatever_the_models_own_loss(name):
    model, batch = build(name), rows(ignored=3)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    patch_model(model.train(), SFT)
    values = training_step(Accelerator(cpu=True), model, SFT, [batch])
    assert values["nll"] == pytest.approx(want.item(), rel=1e-5)

"""Labels mean to a patched model what they mean to its own loss: shifted by one, or not."""

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

from bft.head import UnsupportedModel
from bft.loss import IGNORE
from bft.patch import last_stats, patch_model, unpatch_model
from bft.train import training_step
from tests.support.batches import SFT, rows
from tests.support.models import tiny, tiny_config

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
    "MixtralForCausalLM": {
        "num_local_experts": 4,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
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
    torch.testing.assert_close(
        nll[kept].mean(),
        torch.nn.functional.cross_entropy(logits[kept].float(), target[kept]),
        rtol=1e-3 if dtype == torch.float32 else 2e-2,
        atol=0,
    )


class Own(hf.LlamaForCausalLM):
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

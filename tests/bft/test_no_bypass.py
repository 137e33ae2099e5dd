"""Public ways to a loss around a patched model: ours runs, or an error names the ways out.

Any other number would be trained on in silence.
"""

import copy

import accelerate
import peft
import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import add_fused_lm_head, selective_log_softmax

from bft.guard import Bypassed
from bft.integrations.transformers import BFTTrainer
from bft.loss import HeadLoss
from bft.patch import fused_loss, patch_model
from tests.support.batches import rows
from tests.support.models import tiny
from tests.support.runs import one_step

DFT = HeadLoss(scheme="dft", normalize="token")  # which no other code here computes unasked


def logits(model, b):
    return model(input_ids=b["input_ids"]).logits


def shifted(values, b):
    return cross_entropy(values[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())


def by_head(hidden, model, b):
    return shifted(model.get_output_embeddings()(hidden), b)


def by_trainer(kind, model, b, **settings):
    args = hf.TrainingArguments(**one_step("unused"), **settings)
    return kind(model, args).compute_loss(model, dict(b))


def fused_by_trl(model, b):
    add_fused_lm_head(model)
    return model(**b, fused_lm_head=True).loss


def with_adapters(model, b):
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    return peft.get_peft_model(model, config)(**b).loss


OURS = {
    "call": lambda m, b: m(**b).loss,
    "positional": lambda m, b: m(b["input_ids"], labels=b["labels"]).loss,
    "forward": lambda m, b: m.forward(**b).loss,
    "tuple": lambda m, b: m(**b, return_dict=False)[0],
    "shift_labels": lambda m, b: (
        m(
            b["input_ids"],
            shift_labels=b["labels"].roll(-1, 1).index_fill(1, torch.tensor([11]), -100),
        ).loss
    ),
    "fused_loss": lambda m, b: fused_loss(m, b, DFT)[0],
    "copy": lambda m, b: copy.deepcopy(m)(**b).loss,
    "checkpoint": lambda m, b: checkpoint(lambda **k: m(**k).loss, **b, use_reentrant=False),
    "functional_call": lambda m, b: torch.func.functional_call(m, {}, (), b).loss,
    "compile": lambda m, b: torch.compile(m, backend="eager")(**b).loss,
    "DataParallel": lambda m, b: torch.nn.DataParallel(m)(**b).loss,
    "accelerate": lambda m, b: accelerate.Accelerator(cpu=True).prepare(m)(**b).loss,
    "peft": with_adapters,
    "Trainer": lambda m, b: by_trainer(hf.Trainer, m, b),
    "BFTTrainer": lambda m, b: by_trainer(
        lambda *a: BFTTrainer(*a, scheme="dft", normalize="token"), m, b
    ),
}
REFUSED = {
    "logits": lambda m, b: shifted(logits(m, b), b),
    "loss_function": lambda m, b: m.loss_function(logits(m, b), b["labels"], 61),
    "ForCausalLMLoss": lambda m, b: ForCausalLMLoss(logits(m, b), b["labels"], 61),
    "LabelSmoother": lambda m, b: LabelSmoother(0.1)({"logits": logits(m, b)}, b["labels"], True),
    "log-probabilities": lambda m, b: -selective_log_softmax(logits(m, b), b["labels"]).mean(),
    "hidden_states": lambda m, b: by_head(
        m(input_ids=b["input_ids"], output_hidden_states=True).hidden_states[-1], m, b
    ),
    "base_model": lambda m, b: by_head(m.base_model(b["input_ids"])[0], m, b),
    "get_decoder": lambda m, b: by_head(m.get_decoder()(b["input_ids"])[0], m, b),
    "class's forward": lambda m, b: type(m).forward(m, **b).loss,
    "head": lambda m, b: by_head(m.model.embed_tokens(b["input_ids"]), m, b),
    "add_fused_lm_head": fused_by_trl,
    "label_smoothing_factor": lambda m, b: by_trainer(hf.Trainer, m, b, label_smoothing_factor=0.1),
    "compute_loss_func": lambda m, b: by_trainer(
        lambda *a: hf.Trainer(*a, compute_loss_func=lambda o, *_, **__: o.logits.sum()), m, b
    ),
}


def patched():
    return patch_model(tiny("LlamaForCausalLM"), DFT)


@pytest.mark.parametrize("way", OURS)
def test_the_fused_loss_is_what_comes(way, fresh_accelerator):
    batch = rows()
    want = fused_loss(tiny("LlamaForCausalLM"), batch, DFT)[0]
    loss = OURS[way](patched(), batch)
    torch.testing.assert_close(loss, want)
    loss.backward()


@pytest.mark.parametrize("way", REFUSED)
def test_another_loss_is_refused_with_the_ways_out(way, fresh_accelerator):
    with pytest.raises(Bypassed, match=r"unpatch_model.* fused_loss.* allow_unlabelled=True"):
        REFUSED[way](patched(), rows()).backward()

"""Ways to a loss around a patched model: either ours ran, or an error names the way out."""

import copy
import functools
import inspect
import pickle
from types import MethodType

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import add_fused_lm_head

from bft.guard import Bypassed
from bft.head import LogitTransform, UnsupportedModel
from bft.loss import HeadLoss
from bft.patch import fused_loss, patch_model
from tests.support.batches import rows
from tests.support.models import tiny

DFT = HeadLoss(scheme="dft", normalize="token")  # far from cross-entropy on random weights
patch = functools.partial(patch_model, loss=DFT)
# Without measurements, which torch.compile would follow for a while.
at_once = functools.partial(patch, transform=LogitTransform(), shift=True, verify=False)
WAY_OUT = r"fused_loss\(model, batch, loss\)\[0\]"


@pytest.fixture
def model():
    return tiny("LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected():
    return fused_loss(tiny("LlamaForCausalLM"), rows(), DFT)[0].item()


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerator):
    yield
    torch.compiler.reset()


def theirs(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def custom(logits, labels, **_):
    return theirs(logits, labels)


def liger(model, input_ids, labels=None, **_):
    """As a fused loss of others: the body, and the head's weight."""
    hidden = model.base_model(input_ids=input_ids)[0]
    return hf.modeling_outputs.CausalLMOutput(
        loss=theirs(linear(hidden, model.lm_head.weight), labels)
    )


def lora(model, **settings):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))


def compiled(model):
    return torch.compile(model, backend="eager")


def called(prepare, model, batch):
    """The model as ``prepare`` made it, called before and after the patch."""
    prepared = prepare(model)
    prepared(**batch).loss.backward()
    at_once(model)
    return prepared(**batch).loss


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def in_one_process(way):
    """A way that needs torch's processes."""

    @functools.wraps(way)
    def run(model, batch):
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            return way(model, batch)
        finally:
            destroy_process_group()

    return run


def on_bfloat16(model):
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def virtual_tokens(model):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    return peft.get_peft_model(model, settings)


OURS = {
    "call": lambda m, b: patch(m)(**b).loss,
    "tuple": lambda m, b: patch(m)(b["input_ids"], labels=b["labels"], return_dict=False)[0],
    "shift_labels": lambda m, b: (
        patch(m)(
            b["input_ids"],
            shift_labels=torch.nn.functional.pad(b["labels"][:, 1:], (0, 1), value=-100),
        ).loss
    ),
    "forward": lambda m, b: patch(m).forward(**b).loss,
    "function of forward": lambda m, b: patch(m).forward.__func__(m, **b).loss,
    "unwrapped forward": lambda m, b: inspect.unwrap(patch(m).forward)(**b).loss,
    "Module.__call__": lambda m, b: torch.nn.Module.__call__(patch(m), **b).loss,
    "inputs_embeds": lambda m, b: (
        patch(m)(inputs_embeds=m.get_input_embeddings()(b["input_ids"]), labels=b["labels"]).loss
    ),
    "hidden states beside labels": lambda m, b: patch(m)(**b, output_hidden_states=True).loss,
    "checkpoint of the call": lambda m, b: checkpoint(
        lambda: m(**b).loss, use_reentrant=patch(m) is None
    ),
    "gradient checkpointing": lambda m, b: (m.gradient_checkpointing_enable(), patch(m)(**b).loss)[
        1
    ],
    "functional_call": lambda m, b: (
        functional_call(patch(m), dict(m.named_parameters()), (), b).loss
    ),
    "loss_function": lambda m, b: (setattr(m, "loss_function", custom), patch(m)(**b).loss)[1],
    "deepcopy": lambda m, b: copy.deepcopy(patch(m))(**b).loss,
    "copy": lambda m, b: copy.copy(patch(m))(**b).loss,
    "pickle": lambda m, b: pickle.loads(pickle.dumps(patch(m)))(**b).loss,
    "DDP, then patch": in_one_process(lambda m, b: patch(DistributedDataParallel(m))(**b).loss),
    "patch, then DDP": in_one_process(lambda m, b: DistributedDataParallel(patch(m))(**b).loss),
    "PEFT, then patch": lambda m, b: patch(lora(m))(**b).loss,
    "patch, then PEFT": lambda m, b: lora(patch(m))(**b).loss,
    "PEFT, called, then patch": functools.partial(called, lora),
    "accelerate, then patch": functools.partial(called, on_bfloat16),
    "patch, then accelerate": lambda m, b: on_bfloat16(patch(m))(**b).loss,
    "accelerate, unwrapped": lambda m, b: (
        extract_model_from_parallel(on_bfloat16(patch(m)), keep_fp32_wrapper=False)(**b).loss
    ),
    "compile, called, then patch": functools.partial(called, compiled),
    "compile in place, called, then patch": functools.partial(called, compiled_in_place),
    "patch, then compile": lambda m, b: compiled(at_once(m))(**b).loss,
}


@pytest.mark.parametrize("way", OURS)
def test_ours_ran(way, model, expected):
    value = OURS[way](model, rows())
    assert value.item() == pytest.approx(expected, rel=2e-2 if "accelerate" in way else 1e-5)
    value.backward()


def layer_by_layer(model, batch):
    body = model.model
    hidden = body.embed_tokens(batch["input_ids"])
    angles = body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in body.layers:
        hidden = layer(hidden, position_embeddings=angles)
    return theirs(linear(body.norm(hidden), model.lm_head.weight), batch["labels"])


def bound_before(model, batch):
    forward = model.forward
    patch(model)
    return forward(**batch).loss


def trl_head(model, batch):
    add_fused_lm_head(model)
    return model(**batch, fused_lm_head=True).loss


def over_the_class(model, batch):
    patch(model).forward = MethodType(type(model).forward, model)
    return model(**batch).loss


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, labels):
        return theirs(self.inner(input_ids).logits, labels)


def no_labels(**options):
    return lambda m, b: theirs(patch(m)(b["input_ids"], **options).logits, b["labels"])


ERRORS = {
    "logits": no_labels(),
    "logits beside no labels": no_labels(labels=None),
    "logits of a cache": no_labels(use_cache=True),
    "last hidden states": lambda m, b: theirs(
        m.lm_head(patch(m)(b["input_ids"], output_hidden_states=True).hidden_states[-1]),
        b["labels"],
    ),
    "logits in a tuple": lambda m, b: patch(m)(b["input_ids"], return_dict=False)[0].sum(),
    "loss_function": lambda m, b: m.loss_function(
        logits=patch(m)(b["input_ids"]).logits, labels=b["labels"], vocab_size=61
    ),
    "a module around": lambda m, b: Wrapper(patch(m))(**b),
    "class's forward": lambda m, b: type(m).forward(patch(m), **b).loss,
    "forward bound before": bound_before,
    "class's forward over the patch": over_the_class,
    "body": lambda m, b: liger(patch(m), **b).loss,
    "decoder": lambda m, b: patch(m).get_decoder()(b["input_ids"])[0].sum(),
    "body's forward": lambda m, b: patch(m).model.forward(b["input_ids"])[0].sum(),
    "layer by layer": lambda m, b: layer_by_layer(patch(m), b),
    "head": lambda m, b: patch(m).lm_head(torch.zeros(1, 2, 16)).sum(),
    "checkpoint of the body": lambda m, b: checkpoint(
        patch(m).model, b["input_ids"], use_reentrant=False
    )[0].sum(),
    "checkpoint of the body, reentrant": lambda m, b: m.lm_head(
        checkpoint(patch(m).model, b["input_ids"], use_reentrant=True)[0]
    ).sum(),
    "functional_call of the body": lambda m, b: functional_call(
        patch(m).model, dict(m.model.named_parameters()), b["input_ids"]
    )[0].sum(),
    "generate with gradients": lambda m, b: inspect.unwrap(patch(m).generate)(
        m, b["input_ids"], max_new_tokens=1
    ),
    "body of a deepcopy": lambda m, b: liger(copy.deepcopy(patch(m)), **b).loss,
    "body of a copy": lambda m, b: liger(copy.copy(patch(m)), **b).loss,
    "body of a pickle": lambda m, b: liger(pickle.loads(pickle.dumps(patch(m))), **b).loss,
    "body in PEFT": lambda m, b: liger(lora(patch(m)).get_base_model(), **b).loss,
    "body in DDP": in_one_process(
        lambda m, b: liger(DistributedDataParallel(patch(m)).module, **b)
    ),
    "logits of DDP": in_one_process(
        lambda m, b: DistributedDataParallel(patch(m))(b["input_ids"]).logits.sum()
    ),
    "logits of accelerate": lambda m, b: on_bfloat16(patch(m))(b["input_ids"]).logits.sum(),
    "logits of compile": lambda m, b: compiled(patch(m))(b["input_ids"]).logits.sum(),
    "compiled body": lambda m, b: compiled(patch(m).model)(b["input_ids"])[0].sum(),
    "Liger over the patch": lambda m, b: (
        setattr(patch(m), "forward", MethodType(liger, m)),
        m(**b),
    )[1],
    "patch over Liger": lambda m, b: (setattr(m, "forward", MethodType(liger, m)), patch(m)(**b))[
        1
    ],
    "TRL's head over the patch": lambda m, b: trl_head(patch(m), b),
    "patch over TRL's head": lambda m, b: (add_fused_lm_head(m), patch(m)(**b, fused_lm_head=True))[
        1
    ],
}


@pytest.mark.parametrize("way", ERRORS)
def test_an_error_names_the_way_out(way, model):
    with pytest.raises((Bypassed, UnsupportedModel), match=WAY_OUT):
        ERRORS[way](model, rows())

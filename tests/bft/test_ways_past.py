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
from torch.nn.functional import cross_entropy, linear, pad
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import add_fused_lm_head, selective_log_softmax

from bft.guard import Bypassed
from bft.head import LogitTransform, UnsupportedModel
from bft.integrations.transformers import BFTTrainer
from bft.loss import HeadLoss
from bft.patch import fused_loss, patch_model
from tests.support.batches import rows
from tests.support.models import tiny
from tests.support.runs import one_step

BATCH = rows()
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
DFT = HeadLoss(scheme="dft", normalize="token")  # far from cross-entropy on random weights
patch = functools.partial(patch_model, loss=DFT)
WAY_OUT = r"fused_loss\(model, batch, loss\)\[0\]|patch_model\(\.\.\., shift=True\)"
# Without measurements, which torch.compile would follow for a while.
patch_at_once = functools.partial(patch, transform=LogitTransform(), shift=True, verify=False)


@pytest.fixture
def model():
    return tiny("LlamaForCausalLM", num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected():
    return fused_loss(tiny("LlamaForCausalLM", num_hidden_layers=1), BATCH, DFT)[0].item()


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerator):
    yield
    torch.compiler.reset()


def theirs(logits, labels=LABELS, **_):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def liger(model, input_ids, labels=LABELS, **_):
    """As fused losses of others: the body, and the head's weight."""
    return theirs(linear(model.base_model(input_ids=input_ids)[0], model.lm_head.weight), labels)


def layer_by_layer(model):
    body, hidden = model.model, model.model.embed_tokens(IDS)
    angles = body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in body.layers:
        hidden = layer(hidden, position_embeddings=angles)
    return theirs(linear(body.norm(hidden), model.lm_head.weight))


def put(model, name, value):
    setattr(model, name, value)
    return model


def trl_head(model):
    add_fused_lm_head(model)
    return model


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def bfloat16(model):
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def by_trainer(model, kind=hf.Trainer, more=(), **settings):
    arguments = hf.TrainingArguments(**one_step("unused"), **settings)
    return kind(model, arguments, **dict(more)).compute_loss(model, dict(BATCH))


def called_before(prepare):
    """A way that calls what ``prepare`` makes of a model before the patch, too."""

    def way(model):
        prepared = prepare(model)
        prepared(**BATCH).loss.backward()
        patch_at_once(model)
        return prepared(**BATCH).loss

    return way


def in_one_process(way):
    """A way that needs torch's processes."""

    def run(model):
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            return way(model)
        finally:
            destroy_process_group()

    return run


OURS = {
    "fused_loss": lambda m: fused_loss(patch(m), BATCH, DFT)[0],
    "DataParallel": lambda m: torch.nn.DataParallel(patch(m))(**BATCH).loss,
    "Trainer": lambda m: by_trainer(patch(m)),
    "BFTTrainer": lambda m: by_trainer(
        patch(m), BFTTrainer, {"scheme": "dft", "normalize": "token"}
    ),
    "call": lambda m: patch(m)(**BATCH).loss,
    "tuple": lambda m: patch(m)(IDS, labels=LABELS, return_dict=False)[0],
    "shift_labels": lambda m: patch(m)(IDS, shift_labels=pad(LABELS[:, 1:], (0, 1), value=-100))[0],
    "inputs_embeds": lambda m: patch(m)(inputs_embeds=m.model.embed_tokens(IDS), labels=LABELS)[0],
    "hidden states, too": lambda m: patch(m)(**BATCH, output_hidden_states=True).loss,
    "forward": lambda m: patch(m).forward(**BATCH).loss,
    "function of forward": lambda m: patch(m).forward.__func__(m, **BATCH).loss,
    "unwrapped forward": lambda m: inspect.unwrap(patch(m).forward)(**BATCH).loss,
    "Module.__call__": lambda m: torch.nn.Module.__call__(patch(m), **BATCH).loss,
    "functional_call": lambda m: functional_call(patch(m), dict(m.named_parameters()), (), BATCH),
    "loss_function": lambda m: patch(put(m, "loss_function", theirs))(**BATCH).loss,
    "checkpoint": lambda m: checkpoint(patch(m).forward, IDS, labels=LABELS, use_reentrant=False),
    "checkpoints": lambda m: patch(m).gradient_checkpointing_enable() or m(**BATCH).loss,
    "copy": lambda m: copy.copy(patch(m))(**BATCH).loss,
    "deepcopy": lambda m: copy.deepcopy(patch(m))(**BATCH).loss,
    "pickle": lambda m: pickle.loads(pickle.dumps(patch(m)))(**BATCH).loss,
    "DDP, patch": in_one_process(lambda m: patch(DDP(m))(**BATCH).loss),
    "patch, DDP": in_one_process(lambda m: DDP(patch(m))(**BATCH).loss),
    "PEFT, patch": lambda m: patch(lora(m))(**BATCH).loss,
    "PEFT, call, patch": called_before(lora),
    "patch, PEFT": lambda m: lora(patch(m))(**BATCH).loss,
    "bfloat16, call, patch": called_before(bfloat16),
    "patch, bfloat16": lambda m: bfloat16(patch(m))(**BATCH).loss,
    "bfloat16, unwrapped": lambda m: (
        extract_model_from_parallel(bfloat16(patch(m)), keep_fp32_wrapper=False)(**BATCH).loss
    ),
    "compile, call, patch": called_before(compiled),
    "compile in place, call, patch": called_before(compiled_in_place),
}
ERRORS = {
    "ForCausalLMLoss": lambda m: ForCausalLMLoss(patch(m)(IDS).logits, LABELS, 61),
    "LabelSmoother": lambda m: LabelSmoother(0.1)({"logits": patch(m)(IDS).logits}, LABELS, True),
    "log-probabilities": lambda m: selective_log_softmax(patch(m)(IDS).logits, LABELS),
    "label_smoothing_factor": lambda m: by_trainer(patch(m), label_smoothing_factor=0.1),
    "compute_loss_func": lambda m: by_trainer(
        patch(m), more={"compute_loss_func": lambda o, *_, **__: o.logits.sum()}
    ),
    "logits": lambda m: theirs(patch(m)(IDS).logits),
    "logits of a cache": lambda m: theirs(patch(m)(IDS, use_cache=True).logits),
    "logits in a tuple": lambda m: theirs(patch(m)(IDS, return_dict=False)[0]),
    "loss_function": lambda m: m.loss_function(patch(m)(IDS).logits, LABELS, vocab_size=61),
    "hidden states": lambda m: m.lm_head(patch(m)(IDS, output_hidden_states=True)[1][-1]),
    "generate": lambda m: inspect.unwrap(patch(m).generate)(m, IDS, max_new_tokens=1),
    "class's forward": lambda m: type(m).forward(patch(m), **BATCH).loss,
    "its forward before": lambda m: (m.forward, patch(m))[0](**BATCH).loss,
    "class's forward put over": lambda m: put(patch(m), "forward", MethodType(type(m).forward, m))(
        **BATCH
    ),
    "body": lambda m: liger(patch(m), IDS),
    "body's forward": lambda m: patch(m).model.forward(IDS)[0].sum(),
    "layer by layer": lambda m: layer_by_layer(patch(m)),
    "decoder": lambda m: theirs(patch(m).get_decoder()(IDS)[0]),
    "head": lambda m: theirs(patch(m).lm_head(torch.zeros(2, 12, 16))),
    "functional_call": lambda m: functional_call(patch(m), dict(m.named_parameters()), IDS),
    "functional body": lambda m: functional_call(patch(m).model, dict(m.model.state_dict()), IDS),
    "checkpoint": lambda m: checkpoint(patch(m), IDS, use_reentrant=False).logits.sum(),
    "checkpoint of the body": lambda m: checkpoint(patch(m).model, IDS, use_reentrant=False),
    "reentrant body": lambda m: m.lm_head(checkpoint(patch(m).model, IDS, use_reentrant=True)[0]),
    "body of a copy": lambda m: liger(copy.copy(patch(m)), IDS),
    "body of a deepcopy": lambda m: liger(copy.deepcopy(patch(m)), IDS),
    "body of a pickle": lambda m: liger(pickle.loads(pickle.dumps(patch(m))), IDS),
    "DDP": in_one_process(lambda m: theirs(DDP(patch(m))(IDS).logits)),
    "body in DDP": in_one_process(lambda m: liger(DDP(patch(m)).module, IDS)),
    "PEFT": lambda m: theirs(lora(patch(m))(input_ids=IDS).logits),
    "body in PEFT": lambda m: liger(lora(patch(m)).get_base_model(), IDS),
    "bfloat16": lambda m: theirs(bfloat16(patch(m))(IDS).logits),
    "compile": lambda m: theirs(compiled(patch(m))(IDS).logits),
    "compiled body": lambda m: theirs(compiled(patch(m).model)(IDS)[0]),
    "patch, Liger": lambda m: put(patch(m), "forward", MethodType(liger, m))(**BATCH),
    "Liger, patch": lambda m: patch(put(m, "forward", MethodType(liger, m)))(**BATCH),
    "patch, TRL": lambda m: trl_head(patch(m))(**BATCH, fused_lm_head=True),
    "TRL, patch": lambda m: patch(trl_head(m))(**BATCH, fused_lm_head=True),
}


# torch.compile takes most of the time; of a patched model it is in test_patch.
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.slow) if "in place" in w else w for w in OURS]
)
def test_ours_ran(way, model, expected):
    value = OURS[way](model)
    value = getattr(value, "loss", value)
    assert value.item() == pytest.approx(expected, rel=2e-2 if "bfloat16" in way else 1e-5)
    value.backward()


@pytest.mark.parametrize("way", ERRORS)
def test_an_error_names_the_way_out(way, model):
    with pytest.raises((Bypassed, UnsupportedModel), match=WAY_OUT):
        ERRORS[way](model)

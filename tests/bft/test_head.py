"""Finding a model's head, and measuring what the model does to its logits."""

import pytest
import torch
import transformers
from torch import nn

from bft.head import (
    LogitTransform,
    UnsupportedModel,
    causal_lm,
    find_head,
    verify_linear,
)
from bft.loss import HeadLoss
from bft.measure import probe, read_transform
from bft.patch import patch_model, use_loss
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
    model = patch_model(edited(edit), HeadLoss())
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
            patch_model(model, HeadLoss())
    model.lm_head = nn.ReLU()
    with pytest.raises(UnsupportedModel, match="ReLU has no weight tensor"):
        patch_model(model, HeadLoss())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_head_passes_and_another_does_not(dtype):
    head = nn.Linear(512, 1000).to(dtype)
    hidden = torch.randn(3, 512).to(dtype)
    verify_linear(head, hidden, head.weight, head.bias)
    with pytest.raises(UnsupportedModel, match="differs from hidden @ weight"):
        verify_linear(lambda h: head(h) * 1.02, hidden, head.weight, head.bias)
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
        use_loss(model, HeadLoss()),
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
        model = patch_model(llama(kind), HeadLoss())
        with pytest.raises(UnsupportedModel, match=f"called its head {times} times"):
            model(**BATCH)

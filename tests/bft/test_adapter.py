"""PEFT's adapters on the head of a patched model, against the model's own logits."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from bft.adapter import low_rank
from bft.head import UnsupportedModel, find_head
from bft.loss import HeadLoss, batch_targets
from bft.patch import fused_loss, last_stats, patch_model, unpatch_model
from tests.bft.test_patch import BFT, V, assert_fused, build, close, eager, rows
from tests.support.allocations import measure_allocations
from tests.support.batches import assert_gradients, gradients_of
from tests.support.models import tiny

DRY = {"init_lora_weights": False}


def adapted(name="llama", **settings):
    config = peft.LoraConfig(**{"r": 2, **DRY, **settings})
    return peft.get_peft_model(build(name), config, autocast_adapter_dtype=False)


CONFIGS = {
    "head alone": {"target_modules": ["lm_head"]},
    "with others": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "r": 4, "lora_alpha": 3},
    "everywhere": {"target_modules": r".*(_proj|lm_head)", "rank_pattern": {"lm_head": 3}},
    "dora elsewhere": {"target_modules": ["q_proj"], "use_dora": True},
    "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained copy of an embedding and its head, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    },
    "both ends, tied": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 7, V - 1], "lm_head": [2, 7]},
    },
    "trained tokens, tied": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "trained tokens of the embedding": {
        "target_modules": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [3, 7]},
    },
}


def moved(model):
    """Its trained parts differ from where they started, so that their gradients show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["head alone", "trained tokens"])
def test_a_sample_of_all_entries_gives_the_gradients_too(kind):
    loss = HeadLoss(window=4, gradient="sampled", eps=1e-300, seed=3)  # every p is larger
    assert_fused(moved(adapted(**CONFIGS[kind])), rows(), BFT, patch=loss)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_and_gradients_are_those_of_the_models_own_logits(kind):
    name = "llama-tied" if kind.endswith(" tied") else "llama"
    model, batch = moved(adapted(name, **CONFIGS[kind])), rows()
    expected = assert_fused(model, batch)[1]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(expected) == trained
    with model.disable_adapter():
        close(model(**batch).loss, eager(model, batch, BFT))
    close(model(**batch).loss, eager(model, batch, BFT))


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "cohere"])
def test_tied_capped_and_scaled_heads(name):
    model = moved(adapted(name, target_modules=["lm_head"]))
    expected = assert_fused(model, rows())[1]
    assert len(expected) == 2  # no gradient of the frozen matrix


def test_packed_rows_and_token_weights():
    model, batch = moved(adapted(target_modules=["lm_head"])), rows()
    del batch["attention_mask"]
    batch["position_ids"] = torch.tensor([[*range(5), *range(7)]]).expand(3, -1).contiguous()
    batch["token_weight"] = torch.rand(3, 12, dtype=torch.float64)
    patch_model(model, BFT)
    other = unpatched(model)
    want = eager(other, batch, BFT)
    expected = gradients_of(other, want)
    got = model(**batch).loss
    close(got, want)
    assert_gradients(gradients_of(model, got), expected)


def unpatched(model):
    """A copy of a patched model, without the patch."""
    return unpatch_model(copy.deepcopy(model))


def test_dropout_acts_on_the_adapter_alone():
    model, batch = moved(adapted(target_modules=["lm_head"], lora_dropout=0.5)), rows()
    patch_model(model, BFT).train()
    layer = model.get_base_model().lm_head
    seen, hidden = [], torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    layer.lora_dropout["default"].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    torch.manual_seed(5)
    first = model(**batch).loss
    torch.manual_seed(5)
    assert torch.equal(model(**batch).loss, first)
    assert not torch.equal(model(**batch).loss, first)
    given, dropped = seen[0]
    assert ((dropped == 0) | (dropped == 2 * given)).all()
    assert 0.3 < float((dropped == 0).double().mean()) < 0.7
    # The whole product, with one draw: the base's logits do not see it.
    with torch.no_grad():
        torch.manual_seed(6)
        want = layer(hidden)
        torch.manual_seed(6)
        a, b = low_rank(layer, hidden, layer.weight)
        close(layer.base_layer(hidden) + a @ b.T, want)
    model.eval()
    close(model(**batch).loss, eager(model, batch, BFT))


def test_several_adapters_and_merged_ones():
    model, batch = moved(adapted(target_modules=["lm_head"])), rows()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"], **DRY))
    model.base_model.set_adapter(["default", "second"])
    model = moved(model.double())
    expected = assert_fused(model, batch)[1]
    assert len(expected) == 4
    for active in (["default"], ["second"]):
        model.base_model.set_adapter(active)
        close(model(**batch).loss, eager(model, batch, BFT))
    before = model(**batch).loss
    model.merge_adapter()
    close(model(**batch).loss, before)
    close(model(**batch).loss, eager(model, batch, BFT))
    with model.disable_adapter():
        plain = model(**batch).loss
        close(plain, eager(model, batch, BFT))
    assert not torch.allclose(plain, before)


def test_a_float32_adapter_beside_a_bfloat16_model():
    base = tiny("LlamaForCausalLM").to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], **DRY)
    model, batch = peft.get_peft_model(base, config), rows()
    layer = model.get_base_model().lm_head
    assert layer.lora_A["default"].weight.dtype == torch.float32
    want = eager(model, batch, BFT)
    want.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = patch_model(model, BFT)(**batch).loss
    torch.testing.assert_close(loss, want.float(), rtol=0.02, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert difference < 0.05, name


def test_an_evaluation_reads_the_adapted_logits_and_copies_carry_their_own():
    model, batch = moved(adapted(target_modules=["lm_head"])), rows()
    own = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    patch_model(model, BFT).eval()
    with torch.no_grad():
        output = model(**batch)
        torch.testing.assert_close(output.logits + 0, own)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    want = model(**batch).loss
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight.mul_(3)
    for twin in twins:
        close(twin(**batch).loss, want)
    assert not torch.allclose(model(**batch).loss, want)
    assert last_stats(model).nll.shape == batch["labels"].shape


def test_a_saved_adapter_gives_the_same_loss(tmp_path):
    model, batch = moved(adapted(target_modules=["lm_head", "v_proj"])), rows()
    want = patch_model(model, BFT)(**batch).loss
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).double()
    loaded.get_base_model().load_state_dict(model.get_base_model().state_dict())
    close(fused_loss(loaded, batch, BFT)[0], want)


ON_THE_HEAD = {
    "lora": {"target_modules": ["lm_head"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7]}},
}


@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_no_merged_matrix_is_made(kind):
    wide = 4000
    model = tiny("LlamaForCausalLM", vocab_size=wide, hidden_size=64)
    config = peft.LoraConfig(r=2, **DRY, **ON_THE_HEAD[kind])
    model = patch_model(peft.get_peft_model(model, config), HeadLoss(max_buffer_bytes=2**17))
    batch = rows()
    model(**batch).loss.backward()  # measures, and makes room for gradients
    measured = measure_allocations(lambda: model(**batch).loss.backward())
    assert measured.largest < 4 * wide * 64 / 2


COPY = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("kind", [*ON_THE_HEAD, "trained copy"])
def test_one_adapter_a_row_is_refused_where_it_changes_the_head(kind):
    config = {**ON_THE_HEAD, "trained copy": COPY}[kind]
    model, batch = moved(adapted(**config)).eval(), rows()
    names = {"adapter_names": ["default", "__base__", "default"]}
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    want = model(**inputs, **names).logits
    patch_model(model, BFT)
    model(**batch)
    with pytest.raises(UnsupportedModel, match=r"adapter_names: got \['default', .*set_adapter"):
        model(**batch, **names)
    torch.testing.assert_close(model(**inputs, **names).logits, want)


def test_one_adapter_a_row_is_right_away_from_the_head():
    model, batch = moved(adapted(target_modules=["q_proj"])).eval(), rows()
    names = {"adapter_names": ["default", "__base__", "default"]}
    logits = model(**batch, **names).logits
    got = patch_model(model, HeadLoss(scheme="sft", normalize="token"))(**batch, **names).loss
    target = batch_targets(batch)[0]
    close(got, nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))


REFUSED = {
    "dora": (peft.LoraConfig(use_dora=True, target_modules=["lm_head"]), "DoraLinearVariant"),
    "bias": (peft.LoraConfig(lora_bias=True, target_modules=["lm_head"]), "lora_bias"),
    "parameter": (
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
        "ParamWrapper",
    ),
    "vera": (peft.VeraConfig(target_modules=["lm_head"], r=2), "vera.layer"),
    "ia3": (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3.layer"),
    "loha": (peft.LoHaConfig(target_modules=["lm_head"]), "loha.layer"),
    "oft": (peft.OFTConfig(target_modules=["lm_head"], oft_block_size=4, r=0), "oft.layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_on_the_head_are_refused_by_name(kind):
    config, named = REFUSED[kind]
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(UnsupportedModel, match=rf"carries an adapter.*{named}.*modules_to_save"):
        patch_model(model, BFT)


def test_an_adapter_that_comes_later_is_looked_at_too():
    model, batch = patch_model(build("llama"), BFT), rows()
    model(**batch)
    model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModel, match="DoraLinearVariant"):
        model(**batch)


def test_trained_tokens_beside_a_bias_are_refused():
    """PEFT computes the logits of such a head without its bias."""
    model = build("llama")
    model.lm_head = nn.Linear(16, V, dtype=torch.float64)
    config = peft.LoraConfig(**ON_THE_HEAD["trained tokens"])
    with pytest.raises(UnsupportedModel, match="leave out the bias"):
        patch_model(peft.get_peft_model(model, config), BFT)


class Packed(nn.Parameter):
    """As bitsandbytes' Params4bit and torchao's tensors: a subclass that holds packed integers."""


@pytest.mark.parametrize("adapter", [False, True])
def test_a_quantised_head_is_refused_and_a_quantised_body_is_not(adapter):
    model, batch = build("llama"), rows()
    layer = model.model.layers[0].self_attn.q_proj

    class Quantised(nn.Linear):
        def forward(self, x):  # it alone can read the weight
            return nn.functional.linear(x, plain)

    plain = layer.weight.detach().clone()
    quantised = Quantised(layer.in_features, layer.out_features, bias=False)
    quantised.weight = Packed(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = quantised
    close(fused_loss(model, batch, BFT)[0], eager(model, batch, BFT))

    model.lm_head.weight = Packed(torch.zeros(V, 16, dtype=torch.float64), requires_grad=False)
    if adapter:
        config = peft.LoraConfig(r=2, target_modules=["lm_head"])
        model = peft.get_peft_model(model, config)
        assert find_head(model.get_base_model())[0] is model.get_base_model().lm_head
    with pytest.raises(UnsupportedModel, match=r"is a Packed of torch\.float64.*quantis"):
        patch_model(model, BFT)


def test_a_head_without_a_weight_is_refused():
    """As GPTQ's and AWQ's layers, which hold ``qweight``, ``qzeros`` and ``scales``."""

    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.bias = 16, V, None
            self.register_buffer("qweight", torch.zeros(2, V, dtype=torch.int32))

        def forward(self, x):
            return x @ torch.ones(16, V, dtype=x.dtype)

    model, batch = build("llama"), rows()
    patch_model(model, BFT)(**batch)
    model.lm_head = Packing()
    with pytest.raises(UnsupportedModel, match=r"Packing has no weight.*GPTQ.*out of quantisation"):
        model(**batch)
    with pytest.raises(UnsupportedModel, match=r"Packing has no weight.*GPTQ.*out of quantisation"):
        patch_model(unpatch_model(model), BFT)


def eight_bit(bnb, linear):
    made = bnb.nn.Linear8bitLt(*linear.weight.T.shape, bias=False, has_fp16_weights=False)
    weight = linear.weight.data.clone()
    made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def four_bit(bnb, linear):
    made = bnb.nn.Linear4bit(*linear.weight.T.shape, bias=False, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False)
    return made.to("cpu")


def quantise(model, kind, but=()):
    """Its linear layers in 8 or 4 bits, where the library is installed."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")

        def chosen(module, name):
            return isinstance(module, nn.Linear) and name not in but

        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in but:
            make = eight_bit if kind == "8 bit" else four_bit
            model.set_submodule(name, make(bnb, module))
    return model


@pytest.mark.parametrize("kind", ["torchao", "8 bit", "4 bit"])
def test_a_base_quantised_by_a_library_with_lora_everywhere(kind):
    model, batch = (
        quantise(tiny("LlamaForCausalLM", hidden_size=64), kind, but=("lm_head",)),
        rows(),
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **DRY)
    model = peft.get_peft_model(model, config)
    sft = HeadLoss(scheme="sft", normalize="token")
    want = model(**batch).loss
    expected = gradients_of(model, want)
    got = patch_model(model, sft)(**batch).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for name, gradient in gradients_of(model, got).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)

    model = quantise(tiny("LlamaForCausalLM", hidden_size=64), kind)
    with pytest.raises(UnsupportedModel, match="Keep the head out of quantisation"):
        patch_model(model, sft)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "8 bit", kind == "4 bit"
    model = peft.get_peft_model(model, config)  # its layer is of a kind of PEFT's own
    with pytest.raises(UnsupportedModel, match="Keep the head out of quantisation"):
        patch_model(model, sft)

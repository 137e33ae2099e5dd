"""The fused head on tiny random models, in float64, against their own logits."""

import dataclasses
import inspect
from unittest.mock import Mock

import accelerate
import peft
import pytest
import torch
from torch import nn

from bft.head import LogitTransform
from bft.isolation import evaluation_mode
from bft.loss import IGNORE, HeadLoss, batch_targets
from bft.patch import fused_loss, last_stats, patch_model, unpatch_model, use_loss
from bft.schemes import load_scheme
from bft_kernels import reference
from tests.support.allocations import measure_allocations
from tests.support.batches import SFT, assert_gradients, gradients_of
from tests.support.models import tiny
from tests.support.problems import OLD_COMPILER

V, D, LENGTH = 61, 16, 12
# Models round parts of their bodies to float32 whatever they are given, so that a difference in the
# last place of float64 can come out as one of float32.
RELATIVE = 1e-6
ONE_GRAPH = pytest.mark.skipif(OLD_COMPILER, reason="torch 2.8 breaks the graph at the head")

DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", TIED),
    "qwen2": ("Qwen2ForCausalLM", TIED),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"head_dim": 8, "final_logit_softcapping": 0.4, "sliding_window": 6},
    ),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.3}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 6.0}),
    "gpt2": ("GPT2LMHeadModel", DRY),
    "gptj": ("GPTJForCausalLM", DRY | {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", DRY | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    # A projection between body and head.
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 8, "dropout": 0.0}),
    # The grouped product of the fused experts knows no float64.
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3, "experts_implementation": "eager"}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
}
TRANSFORMS = {
    "gemma2": LogitTransform(0.5, 1.0),
    "gemma3": LogitTransform(0.4, 1.0),
    "cohere": LogitTransform(None, 1 / 0.3),
    "granite": LogitTransform(None, 6.0),
}


def build(name):
    kind, settings = MODELS[name]
    model = tiny(kind, **settings).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def cells(cases, *properties):
    """Cases, each with a model's name first, of a test that shows this of each model."""
    names = [(case, MODELS[case[0]][0]) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.cell(kind, *properties)) for case, kind in names]


def rows(count=3, seed=0):
    """Right-padded rows of different lengths, the first tokens of each without a label."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (count, LENGTH), generator=draw)
    lengths = LENGTH - 3 * torch.arange(count)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, :2] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def eager(model, batch, loss):
    """The reference loss of the model's own logits: its head is then the identity."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "token_weight")}
    with evaluation_mode(model):  # a patched model trains on no logits
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    target, cu_seqlens, token_weight = batch_targets(batch)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, target.numel() + 1, target.shape[1])
    settings = {
        "scheme": load_scheme(loss.scheme),
        "window": loss.window,
        "normalize": loss.normalize,
    }
    if token_weight is not None:
        settings["token_weight"] = token_weight.flatten()
    return reference.balanced_linear_cross_entropy(
        logits, torch.eye(V, dtype=logits.dtype), target.flatten(), cu_seqlens, **settings
    )


def close(got, want):
    torch.testing.assert_close(got, want, rtol=RELATIVE, atol=0)


BFT = HeadLoss(window=4)


def assert_fused(model, batch, loss=BFT, patch=None):
    """A model, patched now, has the loss and gradients of its own logits; returns these."""
    want = eager(model, batch, loss)
    expected = gradients_of(model, want)
    output = patch_model(model, patch or loss)(**batch)
    assert output.logits is None
    close(output.loss, want)
    assert_gradients(gradients_of(model, output.loss), expected)
    return want, expected


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["sft", "bft"])
@pytest.mark.cell("patch_model", "loss", "gradient")
@pytest.mark.parametrize("name", cells([[name] for name in MODELS], "loss", "gradient"))
def test_loss_and_gradients_are_those_of_the_models_logits(name, scheme):
    model, batch = build(name), rows()
    loss = HeadLoss(scheme=scheme, window=4, normalize="token" if scheme == "sft" else "sequence")
    want = assert_fused(model, batch, loss)[0]
    measured = model._fused_head.transform
    assert measured == TRANSFORMS.get(name, LogitTransform())
    # The first call measured; the later ones use it.
    close(model(**batch).loss, want)
    if scheme == "sft":
        close(want.float(), unpatch_model(model)(**batch).loss)


@pytest.mark.cell("patch_model", "accumulation", "packing")
@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        *cells([(name, "sequence") for name in MODELS if name != "opt"], "packing"),
        *((name, "token") for name in ("llama", "qwen2", "gemma3", "gpt2")),
    ],
)
def test_packed_padded_and_one_by_one_are_the_same(name, normalize):
    loss = HeadLoss(window=4, normalize=normalize)
    model, right = patch_model(build(name), loss), rows()
    lengths = right["attention_mask"].sum(1).tolist()
    documents = [
        {k: right[k][i : i + 1, :n] for k in ("input_ids", "labels")} for i, n in enumerate(lengths)
    ]
    packed = {k: torch.cat([d[k] for d in documents], 1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    # A first token that carries a label must not be predicted from the document before.
    for batch, at in [(right, (1, 0)), (packed, (0, lengths[0])), (documents[1], (0, 0))]:
        batch["labels"][at] = 7
    shift = [LENGTH - n for n in lengths]
    left = {k: torch.stack([v[i].roll(n) for i, n in enumerate(shift)]) for k, v in right.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)

    items = loss.count_items(*batch_targets(packed)[:2])
    assert int(items) == (3 if normalize == "sequence" else sum(n - 2 for n in lengths))
    whole = model(**right).loss
    expected = gradients_of(model, whole)
    if name == "gemma2":  # whose eager attention makes NaN of rows that are padded on the left
        left = right
    for batches in ([packed], [left], documents, [left, right]):
        times = len(batches) if batches == [left, right] else 1
        parts = [model(**b, num_items=items * times).loss for b in batches]
        close(sum(parts), whole)
        assert_gradients(gradients_of(model, *parts), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", [BFT, SFT, HeadLoss(scheme="dft")], ids=lambda loss: loss.scheme)
def test_token_weights_multiply_after_the_scheme(loss, packed):
    """Of any sign. A document of weight 0 has no gradient, and counts as one."""
    batch = rows()
    if packed:
        batch = {k: batch[k].flatten()[None] for k in ("input_ids", "labels")}
        batch["position_ids"] = torch.arange(LENGTH).repeat(3)[None]
    weight = torch.linspace(-1, 2, 3 * LENGTH).view(batch["labels"].shape)
    assert_fused(build("llama"), batch | {"token_weight": weight}, loss)

    model, ones = patch_model(build("llama"), loss), torch.ones_like(weight)
    plain = model(**batch).loss
    assert torch.equal(model(**batch, token_weight=ones).loss, plain)
    without = ones.flatten(0, 1).clone()
    without.view(-1)[:LENGTH] = 0
    got = gradients_of(model, model(**batch, token_weight=without.view_as(weight)).loss)
    items = loss.count_items(*batch_targets(batch)[:2])
    batch["labels"].view(-1)[:LENGTH] = IGNORE
    assert_gradients(got, gradients_of(model, model(**batch, num_items=items).loss))


def test_token_weights_that_would_be_lost_are_refused():
    model, batch = patch_model(build("llama"), BFT), rows()
    weight = torch.ones(batch["labels"].shape)
    with pytest.raises(TypeError, match=r"^loss_scale: .*expected token_weight"):
        model(**batch, loss_scale=weight)
    parameters = list(inspect.signature(model.forward).parameters)
    assert parameters[-2:] == ["token_weight", "kwargs"]  # Trainer keeps the column
    with (
        use_loss(model, lambda hidden, head, target, bounds, items: hidden.sum()),
        pytest.raises(TypeError, match="6 were given"),
    ):
        model(**batch, token_weight=weight)


def test_trainers_count_of_tokens_is_refused_by_a_loss_over_documents():
    model, batch = patch_model(build("llama"), BFT), rows()
    tokens = (batch["labels"] != IGNORE).sum()
    with pytest.raises(ValueError, match=r"^num_items_in_batch: .*expected normalize='token'"):
        model(**batch, num_items_in_batch=tokens)
    by_token = patch_model(build("llama"), dataclasses.replace(BFT, normalize="token"))
    want = by_token(**batch, num_items=tokens).loss
    close(by_token(**batch, num_items_in_batch=tokens).loss, want)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients(num_items):
    model, batch = patch_model(build("llama"), BFT), rows()
    batch["labels"].fill_(IGNORE)
    loss = model(**batch, num_items=num_items).loss
    assert loss.item() == 0
    grads = gradients_of(model, loss)
    assert len(grads) == len(list(model.parameters()))
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_routers_loss_is_added_with_the_models_coefficient(accumulate):
    model, batch = build("mixtral"), rows()
    want = model(**batch, output_router_logits=True)
    expected = gradients_of(model, want.loss)
    patch_model(model, SFT)
    items = SFT.count_items(batch_targets(batch)[0])
    # The same micro-batch twice: the step's auxiliary loss is their mean, not their sum.
    times = 2 if accumulate else 1
    parts = [
        model(**batch, output_router_logits=True, num_items=items * times) for _ in range(times)
    ]
    assert parts[0].aux_loss is not None
    close(sum(p.loss for p in parts).float(), want.loss)
    assert_gradients(gradients_of(model, *[p.loss for p in parts]), expected)
    without = model(**batch)
    assert without.aux_loss is None
    assert without.loss < parts[0].loss * times


def test_the_logits_never_exist():
    model, batch = tiny("LlamaForCausalLM", vocab_size=997), rows(3)
    labels = int((batch_targets(batch)[0] != IGNORE).sum())
    assert labels > D  # the logits are larger than the head's weight
    logits = labels * 997 * torch.float32.itemsize
    patch_model(model, HeadLoss(max_buffer_bytes=1000))
    assert measure_allocations(lambda: model(**batch).loss.backward()).largest < logits
    unpatch_model(model)
    assert measure_allocations(lambda: model(**batch).loss.backward()).largest >= logits


# --- around the model ----------------------------------------------------------------------------


def test_hooks_of_the_head_run_once_around_the_loss_and_may_change_it():
    model, seen = build("llama"), []

    def spy(hidden, head, *rest):
        seen.append("loss")
        return BFT(hidden, head, *rest)

    patch_model(model, spy)
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("after"))
    model.lm_head.register_full_backward_hook(lambda *_: seen.append("backward"))
    for _ in range(2):
        seen.clear()
        model(**rows()).loss.backward()
        assert seen == ["before", "loss", "after", "backward"]
    want = model(**rows()).loss
    model.lm_head.register_forward_hook(lambda _, __, loss: 2 * loss)
    close(model(**rows()).loss, 2 * want)


def test_offloaded_weights_are_there_when_the_loss_needs_them():
    model, batch = build("llama"), rows()
    want = eager(model, batch, BFT)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    patch_model(model, BFT)
    with torch.no_grad():
        close(model(**batch).loss, want)
    assert model.lm_head.weight.device.type == "meta"
    unpatch_model(model)
    assert "_old_forward" in model.__dict__


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_lora_leaves_the_head_frozen(name):
    model, batch = build(name), rows()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    trainable = []

    def spy(hidden, head, *rest):
        trainable.append((hidden.requires_grad, head.weight.requires_grad))
        return BFT(hidden, head, *rest)

    expected = assert_fused(model, batch, patch=spy)[1]
    assert all("lora" in parameter for parameter in expected)
    assert trainable == [(True, False)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, batch = patch_model(build("llama"), BFT), rows()
    want = model(**batch).loss
    expected = gradients_of(model, want)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(**batch).loss
    close(loss, want)
    assert_gradients(gradients_of(model, loss), expected)


def test_autocast():
    model, batch = build("llama").float(), rows()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**batch).loss
        got = patch_model(model, SFT)(**batch).loss
    assert got.dtype == torch.float32
    # Ours accumulates logits in float32, the model's own are rounded to bfloat16.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    assert all(g.isfinite().all() for g in gradients_of(model, got).values())


# --- patching and unpatching ---------------------------------------------------------------------


def test_without_labels_and_unpatched_the_model_is_its_own():
    model, batch = build("gemma3").eval(), rows()
    model.generation_config.pad_token_id = 0
    inputs = {k: v.flip(1) for k, v in batch.items() if k != "labels"}  # padded on the left
    keys, head = set(model.__dict__), set(model.lm_head.__dict__)
    logits, own = model(**inputs).logits, model(**batch).loss
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)

    assert patch_model(model, BFT) is model
    assert "labels" in inspect.signature(model.forward).parameters
    for training in (True, False):
        model.train(training)
        assert model(**batch).logits is None
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    assert set(model.lm_head.__dict__) == head
    assert isinstance(model.lm_head, nn.Linear)

    assert unpatch_model(model) is model
    assert unpatch_model(model) is model
    assert set(model.__dict__) == keys
    assert torch.equal(model(**batch).loss, own)


def test_a_forward_of_the_instance_comes_back():
    model = build("llama")
    own = model.forward
    model.forward = own
    assert unpatch_model(patch_model(model, BFT)).__dict__["forward"] is own


def test_a_failing_loss_leaves_the_head_as_it_was():
    model = patch_model(build("llama"), Mock(side_effect=RuntimeError("out of memory")))
    before = dict(model.lm_head.__dict__)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**rows())
    assert model.lm_head.__dict__ == before
    assert isinstance(model.lm_head, nn.Linear)


def test_mixed_precision_of_accelerate_goes_around_the_patch():
    model, batch = build("llama").float(), rows()
    state = accelerate.state.AcceleratorState
    state._reset_state(True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(patch_model(model, BFT))
    output = prepared(**batch)
    assert output.logits is None
    assert last_stats(prepared).nll.shape == batch["labels"].shape
    with pytest.raises(RuntimeError, match="wrapped after patch_model"):
        unpatch_model(model)
    unpatch_model(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
    assert model(**batch).logits is not None
    state._reset_state(True)


def test_other_losses_for_a_while():
    model, batch = build("llama"), rows()
    other = HeadLoss(scheme="sft")
    value, stats = fused_loss(model, batch, other)
    close(value, eager(model, batch, other))
    assert stats.nll.shape == batch["labels"].shape
    assert "forward" not in model.__dict__
    assert last_stats(model) is None

    patch_model(model, BFT)
    with use_loss(model, other):
        close(model(**batch).loss, value)
    close(model(**batch).loss, eager(model, batch, BFT))
    assert not torch.equal(last_stats(model).token_weight, stats.token_weight)


def test_tuples_positional_arguments_and_other_outputs():
    model, batch = patch_model(build("llama"), BFT), rows()
    want = model(**batch)
    assert want.past_key_values is None
    loss, *_ = model(**batch, return_dict=False)
    close(loss, want.loss)
    close(
        model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, want.loss
    )
    output = model(**batch, output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == 3
    assert output.past_key_values is not None


@pytest.mark.parametrize(
    ("compiled", "loss"),
    [
        (False, BFT),
        pytest.param(True, BFT, marks=ONE_GRAPH),
        pytest.param(True, HeadLoss(scheme="bft.schemes:focal"), marks=ONE_GRAPH),
    ],
    ids=["eager", "compiled", "import path"],
)
def test_a_transform_may_be_given_and_torch_compile_takes_one_graph(compiled, loss):
    model, batch = build("cohere"), rows()
    if loss is not BFT:
        batch["token_weight"] = torch.linspace(-1, 2, 3 * LENGTH).view(3, LENGTH)
    want = eager(model, batch, loss)
    expected = gradients_of(model, want)
    patch_model(model, loss, transform=LogitTransform(None, 1 / 0.3), shift=True, verify=False)
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    loss = call(**batch).loss
    close(loss, want)
    assert_gradients(gradients_of(model, loss), expected)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=[ONE_GRAPH, pytest.mark.slow])])
def test_the_forward_is_exported_with_its_loss(strict):
    model, batch = patch_model(build("llama"), BFT), rows()
    want = model(**batch).loss  # the first call measures
    program = torch.export.export(model, (), batch, strict=strict)
    close(program.module()(**batch).loss, want)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    program = torch.export.export(model.eval(), (), inputs, strict=strict)
    close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("scale", [2.0**16, float("inf")], ids=str)
def test_gradients_are_scaled_and_unscaled(scale):
    """As for float16: a step whose gradients overflow changes nothing."""
    model, batch = patch_model(build("llama"), BFT), rows()
    expected = gradients_of(model, model(**batch).loss)
    before = model.lm_head.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    scaler.scale(model(**batch).loss).backward()
    scaler.unscale_(optimizer)
    if scale < float("inf"):
        assert_gradients(gradients_of(model), expected)
    scaler.step(optimizer)
    assert torch.equal(model.lm_head.weight, before) == (scale == float("inf"))


@pytest.mark.cell("patch_model", "save")
def test_a_patched_model_saves_what_it_would_unpatched(tmp_path):
    model, batch = patch_model(build("llama"), BFT), rows()
    want = model(**batch).loss
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path, dtype=model.dtype)
    assert {n for n, _ in twin.named_parameters()} == {n for n, _ in model.named_parameters()}
    own = twin(**batch)
    assert own.logits is not None
    close(patch_model(twin, BFT)(**batch).loss, want)


@pytest.mark.cell("patch_model", "resume")
def test_a_loop_of_ones_own_goes_on_from_what_it_saved(tmp_path):
    """To the last bit, with a gradient that is drawn: torch holds the random state."""

    def run(steps, saved=None, save=None):
        model = patch_model(build("llama"), HeadLoss(window=4, gradient="sampled", eps=0.5))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
        for step in range(steps):
            if step == save:
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(parts | {"random": torch.get_rng_state()}, tmp_path / "saved")
            optimizer.zero_grad()
            model(**rows()).loss.backward()
            optimizer.step()
        return dict(model.named_parameters())

    whole = run(4, save=2)
    resumed = run(2, torch.load(tmp_path / "saved"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_wrong_calls_are_refused():
    with pytest.raises(TypeError, match=r"^loss: got int, expected a callable"):
        patch_model(build("llama"), 3)
    model, batch = patch_model(build("llama"), BFT), rows()
    with pytest.raises(RuntimeError, match="already patched"):
        patch_model(model, BFT)
    with pytest.raises(ValueError, match=r"labels: got shape \(3, 12\), expected \(3, 1\)"):
        model(**batch, logits_to_keep=1)
    batch["labels"] = batch["labels"][:, :-1]
    with pytest.raises(ValueError, match=r"labels: got shape \(3, 11\), expected \(3, 12\)"):
        model(**batch)
    with pytest.raises(ValueError, match="labels: the batch holds neither labels"):
        fused_loss(model, {"input_ids": batch["input_ids"]}, BFT)

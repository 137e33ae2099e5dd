"""Packed documents that see each other are found out on the first packed batch."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from bft.data import collate_packed
from bft.encode import Example
from bft.head import UnsupportedModel
from bft.loss import IGNORE
from bft.patch import fused_loss, last_stats, patch_model, unpatch_model
from tests.support.batches import SFT
from tests.support.models import tiny

APART = {
    "LlamaForCausalLM": {},
    "Gemma3ForCausalLM": {"head_dim": 8, "sliding_window": 4},
    "GPT2LMHeadModel": {},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Lfm2ForCausalLM": {},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
TOGETHER = {
    "FalconForCausalLM": {},
    "FalconForCausalLM alibi": {"alibi": True},
    "OPTForCausalLM": {},
    "BloomForCausalLM": {},
    "MptForCausalLM": {},
    "MambaForCausalLM": {},
    "OpenAIGPTLMHeadModel": {},
    "BioGptForCausalLM": {},
    "GptOssForCausalLM": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "FalconMambaForCausalLM": {},
    "FalconH1ForCausalLM": MAMBA | {"mamba_d_ssm": 32},
    "BambaForCausalLM": MAMBA,
    "MiniMaxForCausalLM": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoeHybridForCausalLM": MAMBA
    | {
        "num_local_experts": 0,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
    },
    "Qwen3NextForCausalLM": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "XGLMForCausalLM": {},
    "xLSTMForCausalLM": {"hidden_size": 32},
}


def build(name, dtype=torch.float32, **options):
    return tiny(name.split()[0], dtype=dtype, **(APART | TOGETHER)[name], **options)


def packed(*lengths):
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 61, (n,), generator=draw).tolist() for n in lengths]
    return collate_packed([Example(i, i) for i in ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_documents_apart_are_taken(name, dtype):
    model = patch_model(build(name, dtype), SFT).eval()
    for lengths in ((40, 3, 60), (5, 7)):
        model(**packed(*lengths))
    together = last_stats(model).nll[0, 5:11]
    alone = {k: v[:, 5:] for k, v in packed(5, 7).items()}
    model(**alone)
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(together, last_stats(model).nll[0, :6], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TOGETHER)
def test_models_that_do_not_are_refused(name, dtype):
    model = patch_model(build(name, dtype), SFT)
    model(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.ones(2, 5, dtype=torch.long))
    for _ in range(2):  # a second call is no way around
        with pytest.raises(UnsupportedModel, match=r"packed documents see each other.*own"):
            model(**packed(5, 7))
    patch_model(unpatch_model(model), SFT, verify=False)  # this is
    assert model(**packed(5, 7)).loss.isfinite()


def boundaries(*lengths):
    return nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


# What transformers' flash attention is told of documents.
FLASH = {f"cu_seq_lens_{name}": boundaries(5, 7) for name in "qk"}
FLASH |= {f"max_length_{name}": 7 for name in "qk"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("extra", "advice"),
    [
        ({"attention_mask": torch.ones(1, 12, dtype=torch.long)}, "leave attention_mask out"),
        ({"position_ids": None, "cu_seqlens": boundaries(5, 7)}, "pass position_ids that restart"),
        (FLASH | {"position_ids": None}, "pass position_ids that restart"),
    ],
    ids=["mask of ones", "cu_seqlens alone", "cu_seq_lens_q alone"],
)
def test_boundaries_that_only_the_loss_sees_are_refused(extra, advice, attention):
    model = patch_model(build("LlamaForCausalLM", attn_implementation=attention), SFT)
    model(**packed(5, 7))
    with pytest.raises(UnsupportedModel, match=advice):
        model(**packed(5, 7) | extra)


@pytest.mark.parametrize(
    "extra",
    [{"use_cache": True}, {"cu_seqlens": boundaries(5, 7), "position_ids": torch.arange(12)[None]}],
    ids=["a cache", "boundaries beside positions that go on"],
)
def test_what_a_call_was_found_to_be_says_nothing_of_another_kind(extra):
    model = patch_model(build("LlamaForCausalLM"), SFT)
    model(**packed(5, 7))
    model(**packed(5, 7), cu_seqlens=boundaries(5, 7))
    with pytest.raises(UnsupportedModel, match="see each other"):
        model(**packed(5, 7) | extra)


def test_a_leak_that_fades_before_the_first_label_is_seen():
    model = patch_model(build("MambaForCausalLM"), SFT)
    batch = packed(5, 300)
    batch["labels"][:, :-3] = IGNORE
    with pytest.raises(UnsupportedModel, match="see each other"):
        model(**batch)


def test_a_mask_of_blocks_keeps_documents_apart():
    model = patch_model(build("LlamaForCausalLM", attn_implementation="eager"), SFT)
    document = torch.tensor([0] * 5 + [1] * 7)
    seen = (document[:, None] == document) & torch.ones(12, 12).tril().bool()
    mask = torch.zeros(12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    model(**packed(5, 7), attention_mask=mask)
    with pytest.raises(UnsupportedModel, match="leave attention_mask out"):
        model(**packed(5, 7), attention_mask=torch.ones(1, 12, dtype=torch.long))


def test_embeddings_in_place_of_tokens_are_tried_as_well():
    refused = pytest.raises(UnsupportedModel, match="see each other")
    for name, outcome in (("LlamaForCausalLM", nullcontext()), ("FalconForCausalLM", refused)):
        model, batch = patch_model(build(name), SFT), packed(5, 7)
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        with outcome:
            model(**batch)


def test_the_trial_is_made_once_and_only_where_a_batch_can_tell():
    model, calls = patch_model(build("LlamaForCausalLM"), SFT), []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    model(**packed(12))  # one document: nothing to see
    assert len(calls) == 1
    unlabelled = packed(5, 7)
    unlabelled["labels"][:, 5:] = IGNORE
    model(**unlabelled)
    assert len(calls) == 2
    model(**packed(5, 7))
    assert len(calls) == 6
    model(**packed(3, 9))
    assert len(calls) == 7
    fused_loss(model, packed(5, 7), SFT)
    assert len(calls) == 8


def test_a_left_padded_row_is_no_packed_one():
    model = patch_model(build("OPTForCausalLM"), SFT)
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) >= torch.tensor([[0], [3]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    model(**batch)


def test_the_trial_leaves_no_trace():
    losses = []
    for verify in (True, False):
        model = patch_model(build("GPT2LMHeadModel"), SFT, verify=verify)  # with dropout
        model.transformer.h[0].eval()
        torch.manual_seed(5)
        loss = model(**packed(5, 7)).loss
        loss.backward()
        losses.append(loss.item())
        assert [m.training for m in (model, *model.transformer.h)] == [True, False, True]
        assert all(p.grad is not None for p in model.parameters())
    assert losses[0] == losses[1]

"""Models that read images beside text: their loss and gradients with the patch and without."""

import pytest
import torch
import transformers as hf

from bft.patch import patch_model, unpatch_model
from tests.support.batches import SFT, assert_gradients, gradients_of

IMAGE = 63
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3():
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    batch = rows()
    extra = {"pixel_values": torch.randn(2, 3, 28, 28)}
    extra["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return hf.Gemma3ForConditionalGeneration(config), {**batch, **extra}


def llava():
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16).to_dict(),
        image_token_index=IMAGE,
    )
    extra = {"pixel_values": torch.randn(2, 3, 28, 28)}
    return hf.LlavaForConditionalGeneration(config), {**rows(), **extra}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**vision, "patch_size": 4, "temporal_patch_size": 1},
        image_token_id=IMAGE,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )
    batch = rows()
    extra = {"pixel_values": torch.randn(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    extra["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return hf.Qwen2VLForConditionalGeneration(config), {**batch, **extra}


def rows():
    """Two rows of 12 tokens, the third to sixth of each an image's."""
    ids = torch.randint(3, 60, (2, 12))
    ids[:, 2:6] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def assert_same_as_unpatched(model, batch):
    want = model(**batch).loss
    expected = gradients_of(model, want)
    output = patch_model(model, SFT)(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, want)
    assert_gradients(gradients_of(model, output.loss), expected, 1e-4)


NAMES = {
    gemma3: "Gemma3ForConditionalGeneration",
    llava: "LlavaForConditionalGeneration",
    qwen2_vl: "Qwen2VLForConditionalGeneration",
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.cell(n, "loss", "gradient")) for k, n in NAMES.items()],
)
def test_images_beside_text(kind):
    torch.manual_seed(0)
    model, batch = kind()
    assert_same_as_unpatched(model.float(), batch)


def test_positions_of_time_height_and_width():
    """A row is one document then, for the model and for the loss."""
    torch.manual_seed(0)
    model, _ = qwen2_vl()
    ids = torch.randint(3, 60, (2, 12))
    positions = torch.arange(12).expand(3, 2, 12)
    assert_same_as_unpatched(
        model, {"input_ids": ids, "labels": ids, "position_ids": positions.contiguous()}
    )


@pytest.mark.cell("Qwen2VLForConditionalGeneration", "packing")
def test_text_positions_before_them_keep_packed_documents_apart():
    torch.manual_seed(0)
    model, _ = qwen2_vl()
    ids = torch.randint(3, 60, (1, 12))
    parts = [{"input_ids": part, "labels": part} for part in ids.split([5, 7], 1)]
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(4, 1, 12).contiguous()
    tokens = [4, 6]  # a document's first token is not predicted
    alone = [model(**part).loss * n for part, n in zip(parts, tokens, strict=True)]
    want = sum(alone) / sum(tokens)
    patch_model(model, SFT)
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions}
    torch.testing.assert_close(model(**packed).loss, want)
    assert unpatch_model(model)(**packed).loss != want  # its own loss crosses the boundary

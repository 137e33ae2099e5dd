"""Records that a model cannot take are refused by name, where its own forward would fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from bft.encode import DataError, Example
from bft.limits import check_fits, position_table

POSITIONS = 16
DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS}

# Configurations and the positions that their models have.
MODELS: dict[str, tuple[Any, int | None]] = {
    "gpt2": (hf.GPT2Config(**GPT), POSITIONS),
    "gpt-j": (hf.GPTJConfig(**GPT, rotary_dim=4), POSITIONS),
    "openai-gpt": (hf.OpenAIGPTConfig(**GPT), POSITIONS),
    "opt": (
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=POSITIONS,
        ),
        POSITIONS,
    ),
    "bart": (hf.BartConfig(**DECODER, **ENCODER, max_position_embeddings=POSITIONS), POSITIONS),
    "roberta": (hf.RobertaConfig(**BERT, is_decoder=True, pad_token_id=1), POSITIONS - 2),
    "llama": (hf.LlamaConfig(**BERT), None),
    "gpt-neox": (hf.GPTNeoXConfig(**BERT), None),
    "bloom": (hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4), None),
    "xglm": (
        hf.XGLMConfig(
            d_model=32,
            ffn_dim=32,
            num_layers=1,
            attention_heads=4,
            max_position_embeddings=POSITIONS,
        ),
        None,
    ),
}


def build(config: Any, vocabulary: int) -> Any:
    config.vocab_size = vocabulary
    config.bos_token_id = config.eos_token_id = 2
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def example(length: int) -> Example:
    return Example([3 + i % 50 for i in range(length)], [-100] * length, "a.jsonl:7")


@pytest.mark.parametrize("name", MODELS)
def test_records_longer_than_a_table_of_positions(tokenizer: Any, name: str) -> None:
    config, positions = MODELS[name]
    model = build(config, len(tokenizer))
    table = position_table(model)
    assert (table and table.positions) == positions
    longest = 3 * POSITIONS if positions is None else positions
    check_fits([example(longest)], model, tokenizer)
    with torch.no_grad():
        model(input_ids=torch.tensor([example(longest).input_ids]))
        if positions is None:
            return
        with pytest.raises((IndexError, RuntimeError)):  # the premise
            model(input_ids=torch.tensor([example(longest + 1).input_ids]))
    with pytest.raises(
        DataError,
        match=rf"^a\.jsonl:7: {longest + 1} tokens, .* max_length to be at most {longest}",
    ):
        check_fits([example(2), example(longest + 1)], model, tokenizer)


def test_tokens_that_the_model_does_not_have(tokenizer: Any) -> None:
    model = build(hf.GPT2Config(**GPT), len(tokenizer))
    last = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    whole = Example([3, last - 1], [-100, last - 1], "a.jsonl:1")
    check_fits([whole], model, tokenizer)
    with pytest.raises(
        DataError, match=rf"^a\.jsonl:2: token '<tool>' has the id {last}, .*resize"
    ):
        check_fits([whole, Example([3, last], [-100, last], "a.jsonl:2")], model, tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    check_fits([Example([3, last], [-100, last])], model, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(DataError, match=rf"padding token has the id {last + 1}, expected one bel"):
        check_fits([whole], model, tokenizer)


def test_a_head_with_fewer_rows_than_the_embedding_counts(tokenizer: Any) -> None:
    model = build(hf.LlamaConfig(**BERT, tie_word_embeddings=False), len(tokenizer))
    model.set_output_embeddings(torch.nn.Linear(32, 100, bias=False))
    with pytest.raises(DataError, match="has the id 100, expected ids below 100"):
        check_fits([Example([3, 100], [-100, 100])], model, tokenizer)

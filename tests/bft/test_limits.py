"""Records that a model cannot take are refused by name, where its own forward would fail."""

import pytest
import torch

from bft.encode import DataError, Example
from bft.limits import check_fits, position_table
from tests.support.models import tiny

POSITIONS = 16

# Models, and the positions that they have.
MODELS = {
    "GPT2LMHeadModel": ({}, POSITIONS),
    "GPTJForCausalLM": ({"rotary_dim": 4}, POSITIONS),
    "OpenAIGPTLMHeadModel": ({}, POSITIONS),
    "OPTForCausalLM": ({}, POSITIONS),
    "BartForCausalLM": ({}, POSITIONS),
    "RobertaForCausalLM": ({"is_decoder": True, "pad_token_id": 1}, POSITIONS - 2),
    "LlamaForCausalLM": ({}, None),
    "GPTNeoXForCausalLM": ({}, None),
    "BloomForCausalLM": ({}, None),
    "XGLMForCausalLM": ({}, None),
}


def build(name, vocabulary, **settings):
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": POSITIONS}
    return tiny(name, **sizes, **MODELS[name][0], **settings).eval()


def example(length):
    return Example([3 + i % 50 for i in range(length)], [-100] * length, "a.jsonl:7")


@pytest.mark.parametrize("name", MODELS)
def test_records_longer_than_a_table_of_positions(tokenizer, name):
    positions = MODELS[name][1]
    model = build(name, len(tokenizer))
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


def test_tokens_that_the_model_does_not_have(tokenizer):
    model = build("GPT2LMHeadModel", len(tokenizer))
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


def test_a_head_with_fewer_rows_than_the_embedding_counts(tokenizer):
    model = build("LlamaForCausalLM", len(tokenizer))
    model.set_output_embeddings(torch.nn.Linear(16, 100, bias=False))
    with pytest.raises(DataError, match="has the id 100, expected ids below 100"):
        check_fits([Example([3, 100], [-100, 100])], model, tokenizer)

"""Tokenizers that need no download: small, but with real merges and real chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]
TEXT = [
    "What does the heart do? It pumps the blood. The heart affects the nervous system.",
    "It affects the eye. It affects the ear. It affects metabolism and homeostasis.",
    "system\nuser\nassistant\n answer: yes no maybe, then define the term.\n\n",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """Byte-level BPE of 400 tokens with a chat template of the ChatML kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = CHATML
    return fast

"""Tokenizers, models and data that need no download, small but real; a run to train with them."""

import itertools
import json
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from bft.config import TrainConfig
from tests.support.models import tiny

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


def bpe_tokenizer():
    """Byte-level BPE of 400 tokens with a chat template of the ChatML kind."""
    backend = ByteLevelBPETokenizer()
    options = {"vocab_size": 400, "min_frequency": 0, "special_tokens": SPECIAL}
    backend.train_from_iterator(TEXT, **options, show_progress=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture
def data(tmp_path):
    """A file of one record."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "yes or no?", "completion": "yes"}\n', encoding="utf-8")
    return path


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its settings for the life of a process; each test is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def checkpoint_of():
    """Writes a model, or a tiny one of this kind with these settings, and its tokenizer."""

    def write(folder, model="LlamaForCausalLM", **settings):
        tokenizer = bpe_tokenizer()
        if isinstance(model, str):
            sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
            ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = tiny(model, **sizes | ids | settings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, checkpoint_of):
    return checkpoint_of(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    colours = ["red", "green", "blue"]
    rows = [
        {
            "prompt": f"What colour has item {number}?",
            "completion": f"{colours[number % 3]}. Because {number} leaves {number % 3}, always.",
            "answer": f"{colours[number % 3]}.",
        }
        for number in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_run(model_dir, data_file):
    """A configuration without a folder."""
    files = {"train_file": data_file, "eval_file": data_file, "model": str(model_dir)}
    steps = {"window": 6, "steps": 6, "batch_size": 4, "learning_rate": 3e-3}
    return TrainConfig(**files, **steps, eval_limit=6, tensorboard=False)


@pytest.fixture
def config(small_run, tmp_path, fresh_accelerator):
    return replace(small_run, output_dir=tmp_path / "run")


@pytest.fixture
def before_call(monkeypatch):
    """``before_call(owner, name, n, act)``: before the n-th call of a function, ``act`` happens.

    ``act`` is an exception to raise, or is called with the function's arguments.
    """

    def watch(owner, name, number, act):
        original, calls = getattr(owner, name), itertools.count(1)

        def watched(*arguments, **options):
            if next(calls) == number:
                if isinstance(act, type):
                    raise act
                act(*arguments)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    return watch


@pytest.fixture
def flags(tmp_path):
    """The flags of ``bft train`` for a configuration."""

    def write(config):
        path = tmp_path / "flags.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        return ["--config", str(path)]

    return write

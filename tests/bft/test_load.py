"""A model is found by its name, and refuses records where its own forward would fail."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants

from bft.config import SettingError
from bft.encode import DataError, Example
from bft.limits import check_fits, position_table
from bft.load import pretrained
from bft.packaged import PretrainedError
from tests.support.models import tiny


def test_a_folder_is_a_checkpoint_or_says_where_one_is(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, got [^;]*$"):
        pretrained(tmp_path)
    (tmp_path / "model").mkdir()  # as in the folder of a run
    with pytest.raises(ValueError, match=f"the model of that run is {tmp_path}/model$"):
        pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(SettingError, match=rf"; the model of that run is {tmp_path}$"):
        pretrained(tmp_path / "adapter")
    (tmp_path / "config.json").write_text("{}")
    assert pretrained(tmp_path) == pretrained(str(tmp_path)) == tmp_path


class Hub(BaseHTTPRequestHandler):
    """Knows one model; counts what it is asked."""

    asked = 0

    def do_HEAD(self):
        type(self).asked += 1
        known = self.path.startswith("/owner/some-model-1.5B/")
        self.send_response(200 if known else 404)
        self.send_header("X-Error-Code" if not known else "X-Repo-Commit", "RepoNotFound")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_):
        pass


def go_to(hub, cache, monkeypatch):
    url = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub),
        ("HUGGINGFACE_CO_URL_TEMPLATE", url),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(hub_constants, name, value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    Hub.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        go_to(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Hub
        server.shutdown()
        thread.join()


def test_a_hub_id_passes_through(hub):
    assert pretrained("owner/some-model-1.5B") == Path("owner/some-model-1.5B")
    with pytest.raises(PretrainedError, match=r"shows no 'owner/other'.*smollm2-135m.*folder"):
        pretrained("owner/other")
    assert hub.asked == 2


def test_a_hub_out_of_reach_is_asked_once(tmp_path, monkeypatch, caplog):
    go_to("http://127.0.0.1:1", tmp_path, monkeypatch)
    started = time.perf_counter()
    with pytest.raises(PretrainedError, match=r"hub does not answer for 'owner/a'.*smollm2-135m"):
        pretrained("owner/a")
    for name, text in (("snapshots/f00/config.json", "{}"), ("refs/main", "f00")):
        path = tmp_path / "models--owner--a" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    snapshot = tmp_path / "models--owner--a/snapshots/f00"
    assert pretrained("owner/a") == snapshot
    assert "an earlier download" in caplog.text
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert pretrained("owner/a") == snapshot
    with pytest.raises(PretrainedError, match="hub does not answer for 'owner/b'"):
        pretrained("owner/b")
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "/no/such/folder", "a/b/c"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"smollm2-135m.*checkpoint folder or a hub id") as error:
        pretrained(name)
    assert repr(name) in str(error.value)


# --- records -------------------------------------------------------------------------------------

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


def build(name, vocabulary):
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": POSITIONS}
    return tiny(name, **sizes, **MODELS[name][0]).eval()


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
    says = rf"^a\.jsonl:7: {longest + 1} tokens, .* max_length to be at most {longest}"
    with pytest.raises(DataError, match=says):
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

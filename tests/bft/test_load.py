"""A model is found by its name: a folder, or a hub id, whether the hub answers or not."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants

from bft.config import SettingError
from bft.load import pretrained
from bft.packaged import PretrainedError


def test_a_checkpoint_folder_passes_through(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert pretrained(tmp_path) == tmp_path
    assert pretrained(str(tmp_path)) == tmp_path


def test_an_adapter_alone_is_refused_with_where_the_model_is(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(SettingError, match=rf"; the model of that run is {tmp_path}$"):
        pretrained(tmp_path / "adapter")


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
    snapshot = tmp_path / "models--owner--a" / "snapshots" / "f00"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--a" / "refs").mkdir()
    (tmp_path / "models--owner--a" / "refs" / "main").write_text("f00")
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


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, got [^;]*$"):
        pretrained(tmp_path)
    (tmp_path / "model").mkdir()  # as in the folder of a run
    with pytest.raises(ValueError, match=f"the model of that run is {tmp_path}/model$"):
        pretrained(tmp_path)

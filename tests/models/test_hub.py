"""Models by hub id: a wrong one, a hub that cannot be reached, and what the cache holds; each is known at once."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.companions import save_tiny_kl, save_tiny_text_encoder
from huggingface_hub import constants

from tim.evaluation.pretrained import load_pretrained
from tim.models.autoencoders import Autoencoder
from tim.models.hub import hub_options
from tim.models.text_encoders import TextEncoder

LOADERS = {
    "model.vae_dir": Autoencoder.from_pretrained,
    "model.text_encoder_dir": TextEncoder,
    "--model-path": lambda name: load_pretrained(name, lambda config: (), f"--model-path={name!r}", torch.device("cpu")),
}


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Sets the hub's address, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class NoSuchModel(BaseHTTPRequestHandler):
    """A hub that has no models."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_):
        """Not on the screen."""


@pytest.mark.parametrize("key", LOADERS)
def test_offline_and_a_wrong_id_are_told_apart_at_once(key, online, closed_port, monkeypatch):
    online(closed_port)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(ValueError, match=rf"{key}='owner/name'.*no such folder, and the hub cannot be reached .*[Cc]onnection"):
        LOADERS[key]("owner/name")
    with ThreadingHTTPServer(("127.0.0.1", 0), NoSuchModel) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(server.server_port)
        with pytest.raises(ValueError, match=rf"{key}='owner/name'.*no such folder, and the hub has no such model"):
            LOADERS[key]("owner/name")
        server.shutdown()
    with pytest.raises(ValueError, match=rf"{key}='a/b/c'.*form OWNER/NAME"):
        LOADERS[key]("a/b/c")


def test_offline_the_cache_serves(online, closed_port, tmp_path, monkeypatch):
    online(closed_port)
    for name, save in (("vae", save_tiny_kl), ("text", save_tiny_text_encoder)):
        repo = tmp_path / "cache" / f"models--owner--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        save(repo / "snapshots" / ("0" * 40))
    assert hub_options("owner/vae") == {"local_files_only": True} and hub_options(str(tmp_path)) == {}
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert Autoencoder.from_pretrained("owner/vae").factor == 8
    assert TextEncoder("owner/text", max_length=20).width == 20

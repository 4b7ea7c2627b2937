"""The hub's answers that cannot be used: one RecycleError that names the model, whatever the libraries raise."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.errors import RecycleError

ANSWERS = {
    "a page to log in": (200, b"<html>Log in to this network</html>"),
    "no object": (200, b"[]"),
    "null": (200, b"null"),
    "no fields": (200, b"{}"),
    "fields of other types": (200, b'{"sha": 5, "siblings": "x", "id": null}'),
    "cut": (200, b'{"sha": "abc", "sib'),
    "shorter than promised": (200, None),
    "forbidden": (403, b"Forbidden"),
    "not found": (404, b"Not found"),
    "the proxy wants a password": (407, b"Log in"),
    "too many requests": (429, b"Slow down"),
    "the hub fails": (500, b"Error"),
    "the hub is overloaded": (503, b"Error"),
}


class Hub(ThreadingHTTPServer):
    """Answers every request alike."""

    answer = (200, b"")


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(99 if body is None else len(body)))
        self.end_headers()
        self.wfile.write(body or b"{")

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the place of the hub, and an empty cache."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    close_session()  # it remembers the proxies
    with Hub(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        yield server
        server.shutdown()
    close_session()


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_that_cannot_be_used_names_the_model(hub, name):
    hub.answer = ANSWERS[name]
    with pytest.raises(
        RecycleError, match=r"^model a/b: .*(fetched from http://127.0.0.1|cannot be reached)"
    ) as raised:
        open_checkpoint("a/b")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("HTTP_PROXY", "foo://127.0.0.1:9"),
        ("HTTP_PROXY", "http://127.0.0.1:port"),
        ("HTTP_PROXY", "http://127.0.0.1:9"),
    ],
)
def test_proxy_that_cannot_be_used_names_the_model(hub, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    close_session()
    with pytest.raises(RecycleError, match=r"^model a/b: it (cannot be fetched|is not in the hub's cache)"):
        open_checkpoint("a/b")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "http://", "nowhere", "http://127.0.0.1:port"])
def test_endpoint_that_cannot_be_used_names_the_model(hub, monkeypatch, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(RecycleError, match=r"^model a/b: it (cannot be fetched|is not in the hub's cache)"):
        open_checkpoint("a/b")

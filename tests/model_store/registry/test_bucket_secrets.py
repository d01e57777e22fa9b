"""A bucket that refuses a request quotes it; the keys in it are not for logs, and not in URLs either."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from model_store.registry.objects import ModelStoreError
from model_store.registry.open_objects import open_objects

KEYS = {
    "AWS_ACCESS_KEY_ID": "PLANTEDACCESSKEY",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
}


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        quoted = " ".join([*KEYS.values(), str(self.headers)])
        body = f"<Error><Code>SignatureDoesNotMatch</Code><Message>{quoted}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815 - the standard library's names

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield "s3://models/prefix"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_refusal_is_told_by_its_code_and_without_the_keys(refusing_bucket):
    objects = open_objects(refusing_bucket)
    for ask in (lambda: objects.get("a", 9), lambda: objects.listed("a"), lambda: objects.put("a", b"b")):
        with pytest.raises(ModelStoreError) as refused:
            ask()
        assert "SignatureDoesNotMatch" in str(refused.value)
        assert "AWS_* variables" in str(refused.value)
        assert not [key for key in KEYS.values() if key in str(refused.value)]


def test_keys_in_a_url_are_refused_and_not_shown():
    with pytest.raises(ModelStoreError, match=r"AWS_\* variables") as refused:
        open_objects("s3://key:planted-secret@bucket/prefix")
    assert "planted" not in str(refused.value)

"""Access control: hosts, origins, keys, sizes; and that responses reveal nothing about the machine."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from ollama_forge import __version__
from ollama_forge.serving.api.security import Origins, ServeSettings, allow_host, is_loopback
from tests.loopback import loopback, scripted

CHAT = {"model": "wire", "messages": [{"role": "user", "content": "my secret"}], "stream": False}


def call(
    url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with loopback(scripted(lambda *_: "hello"), ServeSettings(origins=("https://my.page", "https://*.mine"))) as url:
        yield url


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/", None),
        ("GET", "/api/nothing", None),
        ("GET", "/api/chat", None),
        ("POST", "/api/chat", b"{"),
        ("POST", "/api/chat", CHAT),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/messages", b""),
        ("OPTIONS", "/api/chat", None),
    ],
)
def test_every_answer_says_who_it_is_from_and_how_long_it_is(url: str, method: str, path: str, body: Any) -> None:
    _, headers, _ = call(url, method, path, body)
    assert headers.get_all("server") == [f"ollama-forge/{__version__}"]
    assert headers["content-length"] or headers["transfer-encoding"]


def test_what_is_no_http_is_answered_too(url: str) -> None:
    place = urlsplit(url)
    import socket

    with socket.create_connection((place.hostname or "", place.port or 0), timeout=30) as client:
        client.sendall(b"\x16\x03\x01\x02\r\n\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert f"Server: ollama-forge/{__version__}".encode() in answer


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:11435", True),
        ("LOCALHOST", True),
        ("a.localhost", True),
        ("box.local:80", True),
        ("box.internal", True),
        ("127.0.0.1:1", True),
        ("[::1]:80", True),
        ("192.168.1.2", True),
        ("10.0.0.1:80", True),
        ("0.0.0.0", True),
        ("example.com", False),
        ("localhost.example.com", False),
        ("8.8.8.8", False),
        ("[2001:db8::1]", False),
        ("evillocal", False),
    ],
)
def test_hosts(url: str, host: str, allowed: bool) -> None:
    assert allow_host(host) is allowed
    assert call(url, "GET", "/api/version", headers={"Host": host})[0] == (200 if allowed else 403)


def test_an_address_for_other_machines_is_called_by_any_name() -> None:
    with loopback(scripted(lambda *_: ""), ServeSettings(host="0.0.0.0")) as url:
        assert call(url, "GET", "/api/version", headers={"Host": "example.com"})[0] == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost", True),
        ("https://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("http://0.0.0.0", True),
        ("app://obsidian.md", True),
        ("file://", True),
        ("tauri://localhost", True),
        ("vscode-webview://x", True),
        ("vscode-file://x", True),
        ("https://my.page", True),
        ("https://a.mine", True),
        ("https://example.com", False),
        ("http://localhost.example.com", False),
        ("null", False),
        ("chrome-extension://abc", False),
    ],
)
def test_origins(url: str, origin: str, allowed: bool) -> None:
    status, headers, body = call(url, "POST", "/api/chat", CHAT, {"Origin": origin})
    assert (status, headers["access-control-allow-origin"]) == ((200, origin) if allowed else (403, None))
    assert allowed or body == b""
    asked = {"Origin": origin, "Access-Control-Request-Method": "DELETE"}
    status, headers, _ = call(url, "OPTIONS", "/api/delete", None, asked)
    assert status == (204 if allowed else 403)
    if allowed:
        assert "DELETE" in headers["access-control-allow-methods"]
        assert "X-Stainless-Retry-Count" in headers["access-control-allow-headers"]


def test_the_server_itself_is_no_foreign_page(url: str) -> None:
    status, headers, _ = call(url, "GET", "/api/version", None, {"Host": "box.local", "Origin": "http://box.local"})
    assert (status, headers["access-control-allow-origin"]) == (200, None)


def test_all_origins() -> None:
    assert Origins(["*"]).allow("https://example.com")
    assert not Origins().allow("https://example.com")


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "box.local")))


def test_the_key() -> None:
    with loopback(scripted(lambda *_: "hello"), ServeSettings(api_key="s3cret")) as url:
        assert call(url, "GET", "/")[0] == 200
        assert call(url, "HEAD", "/")[0] == 200
        for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
            for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"x-api-key": "\xe9"}):
                status, _, body = call(url, "POST", path, {**CHAT, "max_tokens": 5}, wrong)
                assert status == 401
                assert "error" in json.loads(body)
            for right in ({"Authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}):
                assert call(url, "POST", path, {**CHAT, "max_tokens": 5}, right)[0] == 200
        assert call(url, "GET", "/api/tags")[0] == 401
        assert call(url, "GET", "/openapi.json")[0] == 401


def test_bodies_are_bounded() -> None:
    with loopback(scripted(lambda *_: "hello"), ServeSettings(max_body=1000)) as url:
        large = {**CHAT, "x": "y" * 1000}
        for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
            status, _, body = call(url, "POST", path, large)
            assert status == 413
            assert "larger" in body.decode()
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        connection.request("POST", "/api/chat", iter([b"x" * 600] * 3), encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, list(json.loads(response.read()))) == (413, ["error"])
        connection.close()
        assert call(url, "POST", "/api/chat", CHAT)[0] == 200


def test_failures_say_nothing_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("/home/somebody's " + " ".join(["my", "secret"]))

    with caplog.at_level(logging.DEBUG), loopback(scripted(fail)) as url:
        for path in ("/api/chat", "/v1/chat/completions"):
            for stream in (False, True):
                status, _, body = call(url, "POST", path, {**CHAT, "stream": stream})
                assert status == 500
                assert "internal server error" in body.decode()
                assert b"/" not in body
    assert "fail" in caplog.text  # where it failed is logged
    assert "my secret" not in caplog.text


def test_prompts_are_not_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert call(url, "POST", "/api/chat", CHAT)[0] == 200
        assert call(url, "POST", "/api/chat", {**CHAT, "options": {"top_k": "my secret"}})[0] == 500
    assert "my secret" not in caplog.text


def test_shown_facts_hold_no_path(url: str) -> None:
    for verbose in (False, True):
        _, _, body = call(url, "POST", "/api/show", {"model": "wire", "verbose": verbose})
        shown = json.loads(body)
        assert "\nFROM wire:latest\n" in shown["modelfile"]
        assert (shown["model_info"]["tokenizer.ggml.tokens"] is not None) is verbose

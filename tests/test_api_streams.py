"""The OpenAI and Anthropic routes over a socket: disconnecting clients, failing engines, full queues."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import pytest

from ollama_forge.serving.engine.base import EngineRequest, Token
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.model import ServedModel
from tests.loopback import TOOLS, loopback, scripted

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "wire", "messages": HI},
    "/v1/completions": {"model": "wire", "prompt": "hi"},
    "/v1/responses": {"model": "wire", "input": "hi"},
    "/v1/messages": {"model": "wire", "messages": HI, "max_tokens": 3000},
}


class Slow(ScriptedEngine):
    """An engine that a client can leave in the middle of an answer."""

    async def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        async with aclosing(super().generate(request)) as steps:  # type: ignore[type-var]
            async for step in steps:
                await asyncio.sleep(0.05)
                yield step


def post(url: str, path: str, body: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("POST", path, json.dumps(body) if not isinstance(body, bytes) else body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def engine_of(model: ServedModel) -> Any:
    return model.engine


def until(true: Any) -> None:
    """Wait for what comes soon; a test's own time limit ends what never comes."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with loopback(scripted(lambda *_: "hello", template=TOOLS)) as base:
        yield base


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(path: str, stream: bool) -> None:
    model = scripted(lambda *_: "a" * 3000, engine=Slow)
    engine = engine_of(model)
    with loopback(model) as url:
        at = urlsplit(url)
        body = json.dumps({**BODIES[path], "stream": stream}).encode()
        with socket.create_connection((at.hostname, at.port)) as client:
            client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % path.encode())
            client.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            if stream:
                assert client.recv(10).startswith(b"HTTP/1.1 2")
            until(lambda: engine.active == 1)
        until(lambda: engine.active == 0)
        assert engine.served == 1
        assert model.admission.running == 0


@pytest.mark.parametrize("path", BODIES)
def test_an_engine_that_fails_at_once_is_an_error(path: str) -> None:
    with loopback(scripted(lambda *_: "hello", fail_after=0)) as url:
        for stream in (False, True):
            status, text = post(url, path, {**BODIES[path], "stream": stream})
            assert (status, json.loads(text)["error"]["message"]) == (500, "the engine failed")


@pytest.mark.parametrize("path", BODIES)
def test_an_engine_that_fails_mid_stream_ends_it_in_an_error(path: str) -> None:
    with loopback(scripted(lambda *_: "hello", fail_after=3)) as url:
        assert post(url, path, BODIES[path])[0] == 500
        status, text = post(url, path, {**BODIES[path], "stream": True})
    assert status == 200
    assert "[DONE]" not in text
    last = json.loads(text.strip().rsplit("data: ", 1)[1])
    assert "the engine failed" in json.dumps(last)
    assert "Traceback" not in text


def test_a_full_queue_is_503_in_each_shape() -> None:
    model = scripted(lambda *_: "hello", slots=1)
    model.admission.slots = model.admission.max_waiting = 0
    with loopback(model) as url:
        for path, body in BODIES.items():
            status, text = post(url, path, body)
            error = json.loads(text)["error"]
            assert (status, error["type"]) == (503, "overloaded_error" if path == "/v1/messages" else "api_error")
            assert error["message"].startswith("server busy")


def test_no_tokens_are_no_tokens() -> None:
    with loopback(scripted(lambda *_: "hello")) as url:
        body = json.loads(post(url, "/v1/chat/completions", {**BODIES["/v1/chat/completions"], "max_tokens": 0})[1])
    (choice,) = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], body["usage"]["completion_tokens"]) == (
        "",
        "length",
        0,
    )


def test_a_request_becomes_what_the_engine_is_asked() -> None:
    model = scripted(lambda *_: "one two three")
    chat = {**BODIES["/v1/chat/completions"], "temperature": 0, "seed": 3, "stop": " two", "max_tokens": 50}
    message = {**BODIES["/v1/messages"], "stop_sequences": [" three"], "top_k": 7, "system": "be brief"}
    with loopback(model) as url:
        said = json.loads(post(url, "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2})[1])
        other = json.loads(post(url, "/v1/messages", message)[1])
    first, second = engine_of(model).requests
    assert (first.max_tokens, first.sampling.temperature, first.sampling.seed, first.top_logprobs) == (50, 0, 3, 2)
    assert said["choices"][0]["message"]["content"] == "one"
    assert said["choices"][0]["finish_reason"] == "stop"
    assert len(said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert (second.sampling.top_k, other["stop_reason"], other["stop_sequence"]) == (7, "stop_sequence", " three")
    assert "be brief" in model.tokenizer.decode(list(second.ids))


def test_ruled_out_tools_are_not_shown_and_calls_are_not_parsed() -> None:
    call = '{"name": "get_weather", "arguments": {}}'
    model = scripted(lambda *_: call, template=TOOLS)
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    with loopback(model) as url:
        body = {**BODIES["/v1/chat/completions"], "tools": tools}
        (with_,) = json.loads(post(url, "/v1/chat/completions", body)[1])["choices"]
        (without,) = json.loads(post(url, "/v1/chat/completions", {**body, "tool_choice": "none"})[1])["choices"]
    assert with_["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert (without["message"]["content"], without["finish_reason"]) == (call, "stop")
    shown, hidden = (model.tokenizer.decode(list(request.ids)) for request in engine_of(model).requests)
    assert "get_weather" in shown
    assert "get_weather" not in hidden


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'{"model": NaN}', b"[" * 50_000, b"\xff\xfe"])
def test_what_is_no_object_is_refused(url: str, path: str, body: bytes) -> None:
    status, text = post(url, path, body)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


NEST = '{"a":' * 5000 + "1" + "}" * 5000
DEEP = [
    ("/v1/chat/completions", '"tools": [{"function": {"name": "f", "parameters": NEST}}]'),
    ("/v1/chat/completions", '"response_format": {"type": "json_schema", "json_schema": {"schema": NEST}}'),
    ("/v1/chat/completions", '"messages": NEST'),
    ("/v1/responses", '"tools": [{"type": "function", "name": "f", "parameters": NEST}]'),
    ("/v1/responses", '"text": {"format": {"type": "json_schema", "schema": NEST}}'),
    ("/v1/responses", '"input": NEST'),
    ("/v1/messages", '"tools": [{"name": "f", "input_schema": NEST}]'),
    ("/v1/messages", '"system": NEST'),
]


@pytest.mark.parametrize(("path", "field"), DEEP)
def test_what_is_nested_deeply_is_refused(url: str, path: str, field: str) -> None:
    body = json.dumps(BODIES[path])[:-1] + ", " + field.replace("NEST", NEST) + "}"
    assert post(url, path, body.encode())[0] == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_schema_that_is_none_is_refused(url: str, path: str) -> None:
    schema = {"type": "nonsense"}
    format_ = {"type": "json_schema", "name": "x", "schema": schema, "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        body = {**BODIES[path], "stream": stream, "response_format": format_, "text": {"format": format_}}
        status, text = post(url, path, body)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")

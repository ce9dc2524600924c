"""Many clients at once: each gets its own answer, and disconnected clients leave nothing running."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from ollama_forge.serving.api import server as api_server
from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.api.server import Server, bind, server_of
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.system import return_freed_memory
from tests.byte_tokenizer import tokenizer
from tests.loopback import FACTS, ServedModel, loopback, scripted

WAIT = 60.0
WAVES = 4
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much a client has taken")


@dataclass(frozen=True)
class Case:
    """A request, and what its answer must be."""

    path: str
    body: bytes
    status: int
    says: Callable[[httpx.Response], bool]


def echo(request: EngineRequest, prompt: str) -> str:
    """Ends in what the request is known by, so that no two answers are alike."""
    return "you said " + prompt.rpartition("#")[2].partition("#")[0].split("<|")[0]


def spoken(response: httpx.Response) -> str:
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[-1]["done"] is True
    assert all(line["done"] is False for line in lines[:-1])
    return "".join(line["message"]["content"] if "message" in line else line["response"] for line in lines)


def v1_spoken(response: httpx.Response) -> str:
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


def well_formed(number: int, chance: random.Random) -> Case:
    marked = f"#{number}"
    stream = chance.random() < 0.5
    says = f"you said {number}"
    turns = [{"role": "user", "content": "hello" * chance.randrange(9) + marked}]
    match chance.randrange(4):
        case 0:
            body: dict[str, Any] = {"model": "wire", "messages": turns, "stream": stream}
            return Case("/api/chat", json.dumps(body).encode(), 200, lambda r: spoken(r) == says)
        case 1:
            body = {"model": "WIRE:latest", "prompt": marked, "stream": stream, "options": {"temperature": 0}}
            return Case("/api/generate", json.dumps(body).encode(), 200, lambda r: spoken(r) == says)
        case 2:
            body = {"model": "wire", "messages": turns, "stream": True}
            return Case("/v1/chat/completions", json.dumps(body).encode(), 200, lambda r: v1_spoken(r) == says)
        case _:
            body = {"model": "wire", "messages": turns}
            path = "/v1/chat/completions"
            return Case(
                path, json.dumps(body).encode(), 200, lambda r: r.json()["choices"][0]["message"]["content"] == says
            )


MALFORMED: list[tuple[str, bytes, int]] = [
    ("/api/chat", b"", 400),
    ("/api/chat", b"{", 400),
    ("/api/chat", b'{"model": "wire", "messages": "hi"}', 400),
    ("/api/chat", b'{"model": "nosuch", "messages": []}', 404),
    ("/api/chat", b'{"model": "wire", "messages": [{"role": "user", "content": NaN}]}', 400),
    ("/api/chat", b'{"model": "wire", "x": ' + b"[" * 10_001 + b"]" * 10_001 + b"}", 400),
    ("/api/chat", b'{"model": "wire", "x": ' + b"[" * 100_000, 400),
    ("/api/chat", b'{"model": "wire", "messages": [{"images": ["%%"]}]}', 400),
    ("/api/chat", b'{"model": "wire", "think": true, "messages": [{"content": "a"}]}', 400),
    ("/api/generate", b'{"model": "wire", "prompt": "a", "options": {"top_k": "forty"}}', 500),  # as recorded
    ("/api/generate", b'{"model": "wire", "prompt": "a", "format": "yaml"}', 500),  # as recorded
    ("/api/generate", b'{"model": "wire", "prompt": "a", "top_logprobs": 21}', 400),
    ("/api/generate", b'{"model": "wire", "prompt": "a", "context": [99999999]}', 400),
    ("/api/generate", b'{"model": "wire", "prompt": 1e999}', 400),
    ("/api/embed", b'{"model": "wire", "input": 5}', 400),
    ("/api/nothing", b"{}", 404),
    ("/v1/chat/completions", b'{"model": "wire"}', 400),
    ("/v1/chat/completions", b'{"model": "wire", "messages": [{"role": "user", "content": 5}]}', 400),
    ("/v1/messages", b"[]", 400),
    ("/v1/responses", b"\xff\xfe", 400),
]


def malformed(number: int, chance: random.Random) -> Case:
    path, body, status = MALFORMED[number % len(MALFORMED)]
    return Case(path, body, status, lambda response: "error" in response.text or status == 404)


def test_a_thousand_mixed_requests() -> None:
    chance = random.Random(0)
    cases = [(malformed if number % 5 == 0 else well_formed)(number, chance) for number in range(1000)]
    for number in range(0, 1000, 5):  # each of them comes, not only every fifth
        cases[number] = malformed(number // 5, chance)
    model = scripted(echo, slots=8, context_length=1 << 20)

    async def run(url: str) -> None:
        room = asyncio.Semaphore(64)
        async with httpx.AsyncClient(base_url=url, timeout=WAIT) as client:

            async def one(case: Case) -> None:
                async with room:
                    response = await client.post(case.path, content=case.body)
                assert response.status_code == case.status, (case, response.text[:200])
                assert case.says(response), (case, response.text[:500])
                assert "Traceback" not in response.text

            await asyncio.gather(*map(one, cases))

    with loopback(model) as url:
        asyncio.run(run(url))
    engine: Any = model.engine
    assert engine.active == 0
    assert engine.served == 800


def endless() -> ServedModel:
    """Never ends by itself; the length of an answer is what its context holds."""
    byte = tokenizer()

    def script(request: EngineRequest) -> Any:
        return iter(lambda: 70, None)

    return ServedModel("wire", byte, ScriptedEngine(script, slots=16, context_length=1 << 30), FACTS)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


def leave(url: str, path: str, *, stream: bool, read: bool) -> None:
    """Ask for an endless answer and leave, after its beginning or at once."""
    place = urlsplit(url)
    body = json.dumps({"model": "wire", "messages": [{"role": "user", "content": "go on"}], "stream": stream}).encode()
    with closing(socket.create_connection((place.hostname or "", place.port or 0), timeout=WAIT)) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        if read:
            assert client.recv(64).startswith(b"HTTP/1.1 200")


def test_two_hundred_clients_that_leave() -> None:
    model = endless()
    engine: Any = model.engine
    memory: list[int] = []

    async def run(url: str) -> None:
        paths = ["/api/chat", "/v1/chat/completions"]
        # more than there are slots: most leave in the middle of a stream, some before it and some while they wait
        leaving = [
            asyncio.to_thread(leave, url, paths[number % 2], stream=number % 5 != 0, read=number % 5 != 0)
            for number in range(200)
        ]
        served = engine.served
        await asyncio.gather(*leaving)
        assert engine.served - served >= 160
        await until(lambda: engine.active == 0 and model.admission.running == 0 and model.admission.waiting == 0)
        engine.requests.clear()  # which the test's engine keeps
        gc.collect()
        return_freed_memory()
        memory.append(psutil.Process().memory_info().rss)

    with loopback(model) as url:
        for _ in range(WAVES):
            asyncio.run(run(url))
    assert memory[-1] - memory[1] < 4 << 20, [size >> 20 for size in memory]  # the first wave warms up


STALLED, TOKENS = 20, 1500


LONG = {"model": "wire", "messages": [{"role": "user", "content": "go on"}], "stream": True}


def stall(url: str, path: str, asked: dict[str, Any] = LONG) -> socket.socket:
    """Ask for a long answer, and read nothing of it."""
    place = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(WAIT)
    client.connect((place.hostname, place.port))
    body = json.dumps(asked).encode()
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    with closing(client), contextlib.suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            data += piece
    return data


def send_buffers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Give the server's connections send buffers of ``size`` bytes."""

    def sized(host: str, port: int) -> socket.socket:
        listening = bind(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        return listening

    monkeypatch.setattr("tests.loopback.bind", sized)


def long_answers(monkeypatch: pytest.MonkeyPatch, slots: int) -> ServedModel:
    """Answers longer than what the server's buffers hold."""
    send_buffers(monkeypatch, 4096)
    engine = ScriptedEngine(lambda request: [*[70] * TOKENS, 1], slots=slots, context_length=1 << 20)
    return ServedModel("wire", tokenizer(), engine, FACTS)


def test_readers_that_stall_hold_up_nobody_and_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_answers(monkeypatch, slots=16)
    engine: Any = model.engine

    async def run(url: str) -> None:
        paths = ("/api/chat", "/v1/chat/completions")
        stalled = [await asyncio.to_thread(stall, url, paths[number % 2]) for number in range(STALLED)]
        await until(lambda: engine.served == STALLED)
        async with httpx.AsyncClient(base_url=url, timeout=WAIT) as client:
            response = await client.post("/api/generate", json={"model": "wire", "prompt": "a", "stream": False})
        assert response.json()["eval_count"] == TOKENS + 1
        await until(lambda: engine.active == 0 and model.admission.running == 0)
        await asyncio.sleep(1.0)  # longer than the write timeout, so that the server has dropped them
        for data in await asyncio.gather(*(asyncio.to_thread(read_all, client) for client in stalled)):
            assert b'"done":true' not in data
            assert b"[DONE]" not in data

    with loopback(model, ServeSettings(write_timeout=0.3)) as url:
        asyncio.run(run(url))


def test_freed_memory_is_returned_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(api_server, "_BETWEEN_TRIMS", 0)
    monkeypatch.setattr(api_server, "return_freed_memory", trimmed.set)
    with loopback(scripted(lambda *_: "a")):
        assert trimmed.wait(WAIT)


def test_a_whole_response_that_nobody_reads_is_dropped_after_the_keep_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_answers(monkeypatch, slots=1)

    def impatient(*arguments: Any) -> Server:
        server = server_of(*arguments)
        server.config.timeout_keep_alive = 0
        return server

    monkeypatch.setattr("tests.loopback.server_of", impatient)
    body = {"model": "wire", "input": ["a"] * 100}  # less than the buffer at which writing pauses
    with loopback(model, ServeSettings(write_timeout=0.3)) as url:
        client = stall(url, "/api/embed", body)
        time.sleep(1.5)
        assert not read_all(client).endswith(b"}")


@pytest.mark.parametrize("buffer", [4096, pytest.param(1 << 20, marks=linux)])
def test_a_slow_reader_of_a_large_body_is_not_dropped(monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    """It reads steadily, but for many write timeouts less than makes room in the server's buffers."""
    send_buffers(monkeypatch, buffer)
    model = scripted(lambda *_: "a", slots=1)
    body = {"model": "wire", "input": ["a"] * 6000}  # some megabytes of vectors
    with loopback(model, ServeSettings(write_timeout=0.4)) as url:
        client = stall(url, "/api/embed", body)
        head = b"".join(client.recv(512) for _ in range(4))
        began = time.monotonic()
        while time.monotonic() - began < 2.0:
            head += client.recv(512)
            time.sleep(0.01)
        data = head + read_all(client)
    length = int(data.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    answer = data.partition(b"\r\n\r\n")[2]
    assert len(answer) == length > 3 << 19
    assert len(json.loads(answer)["embeddings"]) == 6000


def test_a_reader_that_goes_on_in_time_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_answers(monkeypatch, slots=1)
    engine: Any = model.engine

    async def run(url: str) -> None:
        client = await asyncio.to_thread(stall, url, "/api/chat")
        await until(lambda: engine.served == 1 and engine.active == 0)
        assert model.admission.running == 0
        place = client.makefile("rb")
        lines = await asyncio.to_thread(lambda: [line for line in iter(place.readline, b"0\r\n") if b"{" in line])
        assert len(lines) == TOKENS + 1
        assert json.loads(lines[-1])["done"] is True
        client.close()

    with loopback(model) as url:
        asyncio.run(run(url))


def test_busy() -> None:
    byte = tokenizer()
    engine = ScriptedEngine(lambda request: iter(lambda: 70, None), slots=1, context_length=1 << 30)  # type: ignore[arg-type,return-value]
    model = ServedModel("wire", byte, engine, FACTS, max_queue=1)
    body = {"model": "wire", "prompt": "go on"}

    async def run(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=WAIT) as client:
            running = asyncio.create_task(client.post("/api/generate", json={**body, "stream": False}))
            await until(lambda: model.admission.running == 1)
            waiting = asyncio.create_task(client.post("/api/generate", json=body))
            await until(lambda: model.admission.waiting == 1)
            for path in ("/api/generate", "/api/chat"):
                asked = {**body, "messages": [{"role": "user", "content": "a"}]}
                refused = await client.post(path, json=asked)
                assert refused.status_code == 503
                text = "server busy, please try again.  maximum pending requests exceeded"
                assert refused.json() == {"error": text}
            assert (await client.get("/api/version")).status_code == 200
            for task in (running, waiting):
                task.cancel()
            await until(lambda: model.admission.running == 0 and model.admission.waiting == 0)

    with loopback(model) as url:
        asyncio.run(run(url))
    assert engine.active == 0

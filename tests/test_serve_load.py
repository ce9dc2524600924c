"""Many clients at once: each gets its own answer, and disconnected clients leave nothing running."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.scripted import ScriptedEngine
from tests.byte_tokenizer import tokenizer
from tests.loopback import FACTS, ServedModel, loopback, scripted

WAIT = 60.0


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
    """GenerationRequest for an endless answer and go, after its beginning or at once."""
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

    async def run(url: str) -> None:
        paths = ["/api/chat", "/v1/chat/completions"]
        # more than there are slots: most leave in the middle of a stream, some before it and some while they wait
        leaving = [
            asyncio.to_thread(leave, url, paths[number % 2], stream=number % 5 != 0, read=number % 5 != 0)
            for number in range(200)
        ]
        await asyncio.gather(*leaving)
        assert engine.served >= 160
        await until(lambda: engine.active == 0 and model.admission.running == 0 and model.admission.waiting == 0)

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

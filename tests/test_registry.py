"""Several models of one server: loaded on demand, one loading at a time, and unloaded by keep_alive or for another."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ollama_forge.errors import ForgeError, MemoryTooSmall, UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import KEEP_ALIVE, Lease, ModelRegistry
from tests import tiny
from tests.byte_tokenizer import tokenizer
from tests.loopback import FACTS, loopback
from tests.test_serve_load import read_all, send_buffers, stall

WAIT = 20.0


class Loader:
    """Makes scripted engines of a model; what was made, and what it does instead.

    Attributes:
        gate: a load waits until it is set.
        errors: raised by the next loads.
    """

    def __init__(self) -> None:
        self.engines: list[ScriptedEngine] = []
        self.began = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    def __call__(self) -> ScriptedEngine:
        self.began.set()
        assert self.gate.wait(WAIT)
        if self.errors:
            raise self.errors.pop(0)
        self.engines.append(ScriptedEngine([[70, 71, 1]], slots=2, context_length=128))
        return self.engines[-1]

    @property
    def in_memory(self) -> bool:
        return bool(self.engines) and not self.engines[-1].closed


def models(*names: str) -> tuple[list[ServedModel], list[Loader]]:
    loaders = [Loader() for _ in names]
    made = [
        ServedModel(name, tokenizer(), None, FACTS, make_engine=loader)
        for name, loader in zip(names, loaders, strict=True)
    ]
    return made, loaders


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), WAIT)  # type: ignore[arg-type]

    asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def loaded(registry: ModelRegistry) -> list[str]:
    return [model.name for model in registry.models if registry.is_loaded(model)]


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loaded_once_by_those_who_ask() -> None:
    (a, b), (of_a, of_b) = models("a", "b")

    async def work() -> None:
        registry = ModelRegistry(a, b)
        assert loaded(registry) == []
        leases = await asyncio.gather(*(registry.acquire(a) for _ in range(3)))
        assert loaded(registry) == ["a"]
        assert (len(of_a.engines), len(of_b.engines)) == (1, 0)
        assert a.prompts.context_length == 128
        for lease in leases:
            lease.release()

    run(work)


def test_one_loads_at_a_time_and_loaded_ones_answer() -> None:
    (a, b, c), (_, of_b, of_c) = models("a", "b", "c")
    of_b.gate.clear()

    async def work() -> None:
        registry = ModelRegistry(a, b, c)
        (await registry.acquire(a)).release()
        loading = [asyncio.create_task(registry.acquire(b)), asyncio.create_task(registry.acquire(c))]
        await until(of_b.began.is_set)
        (await registry.acquire(a)).release()
        await asyncio.sleep(0.02)
        assert not of_c.began.is_set()
        of_b.gate.set()
        await asyncio.gather(*loading)
        assert loaded(registry) == ["a", "b", "c"]

    run(work)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ForgeError("a shard is damaged", "download it again"), "a cannot be loaded: a shard is damaged; download it"),
        (KeyError("secret"), r"a cannot be loaded \(KeyError\)"),
    ],
)
def test_a_load_that_fails_is_the_error_of_its_requests(error: Exception, says: str) -> None:
    (a, b), (of_a, _) = models("a", "b")
    of_a.errors = [error]

    async def work() -> None:
        registry = ModelRegistry(a, b)
        (await registry.acquire(b)).release()
        found = await asyncio.gather(registry.acquire(a), registry.acquire(a), return_exceptions=True)
        for one in found:
            assert isinstance(one, EngineError)
            with pytest.raises(EngineError, match=says):
                raise one
        assert loaded(registry) == ["b"]
        (await registry.acquire(a)).release()  # it is tried again
        assert loaded(registry) == ["a", "b"]

    run(work)


def test_who_leaves_while_it_loads_does_not_end_the_load() -> None:
    (a, b), (of_a, _) = models("a", "b")
    of_a.gate.clear()

    async def work() -> None:
        registry = ModelRegistry(a, b, keep_alive=0.0)
        first, second = (asyncio.create_task(registry.acquire(a)) for _ in range(2))
        await until(of_a.began.is_set)
        first.cancel()
        await asyncio.sleep(0.01)
        of_a.gate.set()
        lease = await second
        assert loaded(registry) == ["a"]
        lease.release()
        await until(lambda: not of_a.in_memory)  # the one who left holds nothing
        third = asyncio.create_task(registry.acquire(a))
        of_a.gate.clear()
        await asyncio.sleep(0.02)
        third.cancel()
        of_a.gate.set()
        await until(lambda: len(of_a.engines) == 2)
        await until(lambda: not of_a.in_memory)  # nobody waited for it

    run(work)


# -- unloading --------------------------------------------------------------------------------------------------------


def test_idle_models_are_unloaded_by_keep_alive() -> None:
    (a, b), (of_a, _) = models("a", "b")

    async def work() -> None:
        registry = ModelRegistry(a, b)
        (await registry.acquire(a)).release(0.05)
        assert of_a.in_memory
        lease = await registry.acquire(a)
        await asyncio.sleep(0.1)
        assert of_a.in_memory  # it is in use
        lease.release()  # as long as before
        lease.release(math.inf)  # it has been released
        await until(lambda: not of_a.in_memory)
        assert loaded(registry) == []
        (await registry.acquire(a)).release()
        assert 290 < (registry.expires_at(a).timestamp() - time.time()) <= KEEP_ALIVE

    run(work)


def test_who_leaves_when_it_is_just_loaded_does_not_keep_it() -> None:
    (a, b), (of_a, _) = models("a", "b")
    of_a.gate.clear()

    async def work() -> None:
        registry = ModelRegistry(a, b)
        leaving = asyncio.create_task(registry.acquire(a))
        await until(of_a.began.is_set)
        loading = registry._places[id(a)].loading
        assert loading is not None
        loading.add_done_callback(lambda _: leaving.cancel())
        of_a.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert loaded(registry) == ["a"]
        await registry.touch(a, 0)
        await until(lambda: not of_a.in_memory)

    run(work)


def test_a_request_stops_an_unloading_that_waits_for_another_load() -> None:
    (a, b), (of_a, of_b) = models("a", "b")
    of_b.gate.clear()

    async def work() -> None:
        registry = ModelRegistry(a, b)
        lease = await registry.acquire(a)
        other = asyncio.create_task(registry.acquire(b))
        await until(of_b.began.is_set)
        lease.release(0.0)
        await until(lambda: len(registry._tasks) == 2)  # the load, and the unloading that waits for it
        (await registry.acquire(a)).release(60.0)
        of_b.gate.set()
        await other
        await until(lambda: not registry._tasks)
        assert of_a.in_memory
        assert loaded(registry) == ["a", "b"]
        await registry.close()

    run(work)


def test_one_model_stays() -> None:
    (a,), (of_a,) = models("a")

    async def work() -> None:
        registry = ModelRegistry(a)
        (await registry.acquire(a)).release()
        assert registry.expires_at(a).year > 2200
        await registry.touch(a, 0)
        await until(lambda: not of_a.in_memory)
        await registry.touch(a, None)
        assert loaded(registry) == ["a"]
        assert registry.expires_at(a).year > 2200

    run(work)


def test_unloaded_when_its_requests_have_ended() -> None:
    (a,), (of_a,) = models("a")

    async def work() -> None:
        registry = ModelRegistry(a)
        lease = await registry.acquire(a)
        await registry.touch(a, 0)
        await asyncio.sleep(0.02)
        assert of_a.in_memory
        lease.release()
        await until(lambda: not of_a.in_memory)

    run(work)


def test_the_least_recently_used_idle_model_makes_room() -> None:
    (a, b, c), (of_a, of_b, _) = models("a", "b", "c")

    async def work() -> None:
        registry = ModelRegistry(a, b, c, max_loaded=2)
        busy = await registry.acquire(a)
        (await registry.acquire(b)).release()
        (await registry.acquire(c)).release()  # a was used before b, but is busy
        assert loaded(registry) == ["a", "c"]
        assert not of_b.in_memory
        busy.release()
        (await registry.acquire(c)).release()
        (await registry.acquire(b)).release()
        assert loaded(registry) == ["b", "c"]
        assert not of_a.in_memory

    run(work)


def test_a_busy_model_makes_room_when_its_requests_have_ended() -> None:
    (a, b), (of_a, of_b) = models("a", "b")

    async def work() -> None:
        registry = ModelRegistry(a, b, max_loaded=1)
        busy = await registry.acquire(a)
        other = asyncio.create_task(registry.acquire(b))
        await asyncio.sleep(0.02)
        again = asyncio.create_task(registry.acquire(a))  # behind the other: it waited first
        await asyncio.sleep(0.02)
        assert not other.done()
        assert not of_b.began.is_set()
        busy.release()
        (await other).release()
        assert len(of_a.engines) == 1
        (await again).release()
        assert len(of_a.engines) == 2
        assert loaded(registry) == ["a"]

    run(work)


def test_idle_models_are_unloaded_for_memory() -> None:
    (a, b, c), (of_a, of_b, of_c) = models("a", "b", "c")
    of_c.errors = [MemoryTooSmall("c needs 9 GB"), MemoryTooSmall("c needs 9 GB")]

    async def work() -> None:
        registry = ModelRegistry(a, b, c)
        (await registry.acquire(a)).release()
        lease = await registry.acquire(b)
        with pytest.raises(EngineError, match="c needs 9 GB"):
            await registry.acquire(c)  # a is not enough, and b is busy
        assert (of_a.in_memory, of_b.in_memory) == (False, True)
        lease.release()
        (await registry.acquire(c)).release()

    run(work)


def test_its_memory_is_given_back(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "model")
    model = unloaded_model(checkpoint, "tiny", load=LoadSettings(dtype="float32", device="cpu"), max_queue=1).load()
    module: Any = model.engine.model.module  # type: ignore[attr-defined]
    weights = [weakref.ref(parameter) for parameter in module.parameters()]
    del module

    async def work() -> None:
        registry = ModelRegistry(model)
        (await registry.acquire(model)).release(0.0)
        await until(lambda: not any(weight() is not None for weight in weights))

    run(work)
    assert not model.is_loaded
    with pytest.raises(EngineError, match="not loaded"):
        _ = model.engine


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[tuple[str, list[Loader]]]:
    (a, b), loaders = models("a", "me/b:tag")
    b.metadata = replace(b.metadata, family="other")
    with loopback(ModelRegistry(a, b, max_loaded=1)) as url:
        yield url, loaders


def call(url: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_models_are_listed_and_loaded_on_demand(served: tuple[str, list[Loader]]) -> None:
    url, (of_a, of_b) = served
    assert [one["name"] for one in call(url, "GET", "/api/tags")[1]["models"]] == ["a:latest", "me/b:tag"]
    assert [one["id"] for one in call(url, "GET", "/v1/models")[1]["data"]] == ["a:latest", "me/b:tag"]
    assert call(url, "POST", "/api/show", {"model": "me/b:tag"})[1]["details"]["family"] == "other"
    assert call(url, "GET", "/api/ps")[1]["models"] == []
    said = {"messages": [{"role": "user", "content": "hi"}], "stream": False, "max_tokens": 9}
    assert call(url, "POST", "/api/chat", {"model": "a", **said})[1]["message"]["content"] == "bc"
    (running,) = call(url, "GET", "/api/ps")[1]["models"]
    assert (running["name"], running["context_length"], running["size_vram"]) == ("a:latest", 128, 0)
    for on_device in (running["size"] - 1, running["size"] + 1):  # weights may take more in memory than in their files
        of_a.engines[-1].device_bytes = on_device  # type: ignore[attr-defined]
        (running,) = call(url, "GET", "/api/ps")[1]["models"]
        assert running["size_vram"] == min(on_device, running["size"])
    assert not of_b.engines
    assert call(url, "POST", "/v1/chat/completions", {"model": "me/b:tag", **said})[0] == 200
    assert call(url, "POST", "/v1/messages", {"model": "me/b:tag", **said})[0] == 200
    assert [one["name"] for one in call(url, "GET", "/api/ps")[1]["models"]] == ["me/b:tag"]
    assert not of_a.in_memory
    assert len(call(url, "POST", "/api/embed", {"model": "a", "input": ["x"]})[1]["embeddings"]) == 1
    assert call(url, "POST", "/api/generate", {"model": "a", "keep_alive": 0})[1]["done_reason"] == "unload"
    assert call(url, "GET", "/api/ps")[1]["models"] == []


def test_a_failed_load_over_http(served: tuple[str, list[Loader]]) -> None:
    url, (of_a, _) = served
    said = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"):
        of_a.errors = [ForgeError("a shard is damaged", "download it again")]
        status, body = call(url, "POST", path, {**said, "input": "hi", "stream": True})
        assert status == 500
        assert "a cannot be loaded: a shard is damaged; download it again" in json.dumps(body)
    of_a.errors = [ForgeError("a shard is damaged")]
    assert call(url, "POST", "/api/embed", {"model": "a", "input": "x"})[0] == 500
    assert call(url, "POST", "/api/generate", {"model": "a"})[1]["done_reason"] == "load"


def test_a_refused_prompt_releases_the_model(served: tuple[str, list[Loader]]) -> None:
    url, (of_a, _) = served
    long = {"model": "a", "messages": [{"role": "user", "content": "x" * 500}], "truncate": False, "keep_alive": 0}
    assert call(url, "POST", "/api/chat", long)[0] == 400
    deadline = time.monotonic() + WAIT
    while of_a.in_memory:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_that_stalls_keeps_no_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    send_buffers(monkeypatch, 4096)
    engines: list[ScriptedEngine] = []

    def make() -> ScriptedEngine:
        engines.append(ScriptedEngine([[*[70] * 1500, 1]], slots=2, context_length=1 << 20))
        return engines[-1]

    a = ServedModel("a", tokenizer(), None, FACTS, make_engine=make)
    (b,), _ = models("b")
    with loopback(ModelRegistry(a, b, max_loaded=1)) as url:
        client = stall(url, "/api/chat", {"model": "a", "messages": [{"role": "user", "content": "go on"}]})
        said = {"model": "b", "messages": [{"role": "user", "content": "hi"}], "stream": False}
        deadline = time.monotonic() + WAIT
        while not engines or not engines[0].served:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert call(url, "POST", "/api/chat", said)[1]["message"]["content"] == "bc"
        assert b'"done":true' in read_all(client)  # what was generated is still sent


class SeesImages(ScriptedEngine):
    """Each image is one token."""

    def encode(self, text: str, images: Sequence[bytes]) -> tuple[tuple[int, ...], object]:
        return tuple(range(2, 2 + len(images))), list(images)


def test_prompts_with_images_are_counted_and_shown_by_a_model_that_is_loaded_for_them() -> None:
    engines: list[SeesImages] = []

    def make() -> SeesImages:
        engines.append(SeesImages([[70, 1]], slots=2, context_length=128))
        return engines[-1]

    model = ServedModel("a", tokenizer(), None, FACTS, make_engine=make)
    image = base64.b64encode(b"picture").decode()
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image}}
    asked = {"model": "a", "messages": [{"role": "user", "content": [block]}]}
    shown = {
        "model": "a",
        "messages": [{"role": "user", "content": "see", "images": [image]}],
        "_debug_render_only": True,
    }
    with loopback(ModelRegistry(model, keep_alive=0)) as url:
        for _ in range(2):
            assert call(url, "POST", "/v1/messages/count_tokens", asked) == (200, {"input_tokens": 1})
            assert call(url, "POST", "/api/chat", shown)[1]["_debug_info"]["image_count"] == 1
        deadline = time.monotonic() + WAIT
        while not engines[-1].closed:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# -- the command ------------------------------------------------------------------------------------------------------


def test_names_and_checkpoints_of_the_command() -> None:
    from ollama_forge.cli.serve import _named_models, _require_distinct

    assert _named_models((), ("x", "y")) == [(None, "x"), (None, "y")]
    assert _named_models(("a", "b"), ("x", "y")) == [("a", "x"), ("b", "y")]
    assert _named_models(("a", "b"), ()) == [("a", None), ("b", None)]
    with pytest.raises(UsageError, match=r"\(2\) and --checkpoint \(1\) differ"):
        _named_models(("a", "b"), ("x",))
    _require_distinct(["a", "b", "a:tag"])
    with pytest.raises(UsageError, match="two models are called A"):
        _require_distinct(["a", "b", "A"])


def test_a_lease_releases_once() -> None:
    released: list[float | None] = []
    lease = Lease(released.append)
    lease.release(5.0)
    lease.release()
    assert released == [5.0]

"""What the operator of a server sees: /health, /metrics and the log of requests."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ollama_forge.serving.api import telemetry
from ollama_forge.serving.api.metrics import Metrics
from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.api.telemetry import RequestRecord, log_requests, observed
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelRegistry
from ollama_forge.serving.requests import Done, Event
from tests import engines
from tests.loopback import loopback, scripted

SECRET = "tell-nobody"
CHAT = {"model": "wire", "messages": [{"role": "user", "content": SECRET}], "stream": False}
ANSWER = "Paris."
Samples = dict[tuple[str, ...], float]


def say(request: EngineRequest, prompt: str) -> str:
    return ANSWER


@pytest.fixture
def model() -> ServedModel:
    return scripted(say)


@pytest.fixture
def url(model: ServedModel) -> Iterator[str]:
    with loopback(model) as url:
        yield url


def metrics(url: str) -> Samples:
    """The samples by name and values of labels."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return samples(text)


def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def ended(url: str, *key: str) -> float:
    """The value of a sample, as soon as there is one: a request is counted after its client has its answer."""
    for _ in range(500):
        if key in (found := metrics(url)):
            return found[key]
        time.sleep(0.01)
    raise AssertionError(key)


# -- health -----------------------------------------------------------------------------------------------------------


def test_health_reports_a_dead_worker(url: str, model: ServedModel) -> None:
    alive = httpx.get(f"{url}/health")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    engine: Any = model.engine
    engine.healthy = False
    dead = httpx.get(f"{url}/health")
    assert (dead.status_code, dead.json()) == (503, {"status": "error", "models": ["wire:latest"]})
    assert metrics(url)["ollama_forge_model_healthy", "wire:latest"] == 0


def test_the_transformers_engine_is_healthy_until_it_is_closed(tmp_path: Path) -> None:
    with engines.running(engines.load(tmp_path)) as engine:
        assert engine.healthy
    assert not engine.healthy


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_requests_and_tokens_are_counted(url: str) -> None:
    wire, length = "wire:latest", len(ANSWER) + 1  # the end token counts
    prompts = [httpx.post(f"{url}/api/chat", json=CHAT).json()["prompt_eval_count"] for _ in range(2)]
    cut = {**CHAT, "max_tokens": 2, "stream": True}
    httpx.post(f"{url}/v1/chat/completions", json=cut).raise_for_status()
    assert ended(url, "ollama_forge_answers_total", wire, "length") == 1
    found = metrics(url)
    assert found["ollama_forge_answers_total", wire, "stop"] == 2
    assert found["ollama_forge_generated_tokens_total", wire] == 2 * length + 2
    assert found["ollama_forge_prompt_tokens_total", wire] == 3 * prompts[0] == sum(prompts) + prompts[0]
    assert found["ollama_forge_http_requests_total", "POST", "/api/chat", "200"] == 2
    assert found["ollama_forge_time_to_first_token_seconds_count", wire] == 3
    assert found["ollama_forge_time_per_token_seconds_count", wire] == 3
    assert found["ollama_forge_request_duration_seconds_count", wire] == 3
    assert (found["ollama_forge_requests_waiting", wire], found["ollama_forge_requests_running", wire]) == (0, 0)


def test_embedded_tokens_are_counted(url: str) -> None:
    for path in ("/api/embed", "/v1/embeddings"):
        httpx.post(url + path, json={"model": "wire", "input": ["four", "five5"]}).raise_for_status()
    ended(url, "ollama_forge_http_requests_total", "POST", "/v1/embeddings", "200")
    assert metrics(url)["ollama_forge_prompt_tokens_total", "wire:latest"] == 18


def test_unknown_paths_and_methods_make_no_series_of_their_own(url: str) -> None:
    for path in ("/nosuch", "/api/nosuch/2"):
        httpx.request("BREW", url + path)
    httpx.get(f"{url}/v1/models/any")
    httpx.post(f"{url}/api/chat", json={**CHAT, "model": "another"})
    assert ended(url, "ollama_forge_http_requests_total", "POST", "/api/chat", "404") == 1
    found = metrics(url)
    assert found["ollama_forge_http_requests_total", "other", "other", "404"] == 2
    assert found["ollama_forge_http_requests_total", "GET", "/v1/models/{name:path}", "404"] == 1
    assert not any("another" in key for key in found)


def test_failed_and_refused_answers() -> None:
    model = scripted(say, fail_after=2)
    with loopback(model) as url:
        assert httpx.post(f"{url}/api/chat", json=CHAT).status_code == 500
        assert ended(url, "ollama_forge_answers_total", "wire:latest", "error") == 1
        httpx.post(f"{url}/api/chat", json={**CHAT, "stream": True})  # its status is 200
        ended(url, "ollama_forge_http_requests_total", "POST", "/api/chat", "200")
        assert metrics(url)["ollama_forge_answers_total", "wire:latest", "error"] == 2
        model.admission.slots = model.admission.max_waiting = 0
        assert httpx.post(f"{url}/api/chat", json=CHAT).status_code == 503
        assert ended(url, "ollama_forge_answers_total", "wire:latest", "busy") == 1


def test_a_defect_is_counted_as_a_failure() -> None:
    model = scripted(say)
    engine: Any = model.engine
    engine.script = lambda request: iter(1 / 0 for _ in range(1))
    with loopback(model) as url:
        for stream in (False, True):
            httpx.post(f"{url}/api/chat", json={**CHAT, "stream": stream})
        assert ended(url, "ollama_forge_http_requests_total", "POST", "/api/chat", "500") == 2
        assert metrics(url)["ollama_forge_answers_total", "wire:latest", "error"] == 2


def test_answers_whose_reader_left() -> None:
    model = scripted(say, context_length=1 << 30)
    engine: Any = model.engine
    engine.script = lambda request: itertools.repeat(100)  # an answer without an end
    with loopback(model) as url:
        with httpx.stream("POST", f"{url}/api/chat", json={**CHAT, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            assert metrics(url)["ollama_forge_requests_running", "wire:latest"] == 1
        assert ended(url, "ollama_forge_answers_total", "wire:latest", "cancelled") == 1


def test_several_answers_of_which_one_did_not_end_were_cancelled() -> None:
    async def outcome(*ends: Done) -> str:
        async def events() -> AsyncGenerator[Event]:
            for end in ends:
                yield end

        record = RequestRecord("wire")
        async for _ in observed(events(), record, 2):
            pass
        assert record.answers == list(ends)
        return record.outcome

    assert asyncio.run(outcome(Done("stop"))) == "cancelled"
    assert asyncio.run(outcome(Done("stop"), Done("length", choice=1))) == "length"


def test_cached_tokens_and_latencies() -> None:
    found = Metrics(ModelRegistry())
    done = Done("stop", prompt_tokens=8, tokens=5, load_ns=2 * 10**9, prompt_ns=10**9, answer_ns=4 * 10**9)
    for one in (done, Done("stop", prompt_tokens=8, tokens=1, cached_tokens=6, load_ns=1)):
        record = RequestRecord("wire", [one], "stop")
        found.observe(record, method="POST", route="/api/chat", status=200, seconds=1.0)
    text = samples(found.text("")[0].decode())
    assert text["ollama_forge_prefix_cache_tokens_total", "wire"] == 6
    assert text["ollama_forge_prefix_cache_hits_total", "wire"] == 1
    assert text["ollama_forge_prompt_tokens_total", "wire"] == 16
    assert text["ollama_forge_time_to_first_token_seconds_sum", "wire"] == pytest.approx(3)
    assert text["ollama_forge_time_per_token_seconds_sum", "wire"] == pytest.approx(1)  # four tokens after the first
    assert text["ollama_forge_time_per_token_seconds_count", "wire"] == 1


def test_the_prompt_of_several_answers_counts_once() -> None:
    found = Metrics(ModelRegistry())
    for first in (0, 6):
        ends = [Done("stop", prompt_tokens=8, tokens=5, cached_tokens=7, choice=choice) for choice in (2, 1)]
        ends.append(Done("stop", prompt_tokens=8, tokens=5, cached_tokens=first))  # the first answer ends last
        found.observe(RequestRecord("wire", ends, "stop"), method="POST", route="/", status=200, seconds=1.0)
    text = samples(found.text("")[0].decode())
    assert text["ollama_forge_prompt_tokens_total", "wire"] == 16
    assert text["ollama_forge_prefix_cache_tokens_total", "wire"] == 6
    assert text["ollama_forge_prefix_cache_hits_total", "wire"] == 1
    assert text["ollama_forge_generated_tokens_total", "wire"] == 30


def test_each_server_counts_for_itself(url: str) -> None:
    with loopback(scripted(say)) as another:
        httpx.get(f"{another}/api/version")
        ended(another, "ollama_forge_http_requests_total", "GET", "/api/version", "200")
        assert ("ollama_forge_http_requests_total", "GET", "/api/version", "200") not in metrics(url)
    kind = httpx.get(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"}).headers["content-type"]
    assert kind.startswith("application/openmetrics-text")


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_they_are_guarded(path: str) -> None:
    with loopback(scripted(say), ServeSettings(api_key="k")) as url:
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers={"Authorization": "Bearer k"}).status_code == 200
        assert httpx.get(url + path, headers={"Host": "evil.example", "Authorization": "Bearer k"}).status_code == 403


# -- the log ----------------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """The first lines of the log, which come after the responses."""
    for _ in range(500):
        if len(caplog.messages) >= count:
            break
        time.sleep(0.01)
    return caplog.messages[:count]


def test_the_log_has_a_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ollama_forge.requests")
    with loopback(scripted(say), ServeSettings(api_key=SECRET)) as url:
        key = {"Authorization": f"Bearer {SECRET}"}
        answer = httpx.post(f"{url}/api/chat?k={SECRET}", json=CHAT, headers=key).json()
        assert httpx.get(f"{url}/api/tags%0AGET%20/x", headers=key).status_code == 404
        assert httpx.get(f"{url}/api/tags", headers={"Authorization": "Bearer wrong-one"}).status_code == 401
        chat, broken, refused = lines(caplog, 3)
    tokens = f"prompt_tokens={answer['prompt_eval_count']} tokens={len(ANSWER) + 1}"
    assert chat.rpartition(" ")[0] == f"POST /api/chat 200 wire:latest {tokens} stop"
    assert broken.rpartition(" ")[0] == "GET /api/tags%0AGET%20/x 404"
    assert refused.rpartition(" ")[0] == "GET /api/tags 401"
    assert all(float(line.rpartition(" ")[2].removesuffix("s")) < 60 for line in (chat, broken, refused))
    assert not any(word in caplog.text for word in (SECRET, ANSWER, "wrong-one"))


@pytest.mark.parametrize("quiet", ["", "1"])
def test_the_log_goes_to_stderr_unless_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: str
) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_QUIET", quiet)
    log = telemetry._LOG
    before = log.handlers, log.propagate, log.level
    try:
        log_requests()
        with loopback(scripted(say)) as url:
            httpx.get(f"{url}/api/version")
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("GET /api/version 200 ") == (0 if quiet else 1)

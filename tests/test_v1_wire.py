"""The OpenAI and Anthropic routes beside a real Ollama's recorded answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.serving.engines.base import Request
from tests.loopback import THINKING, TOOLS, loopback, scripted
from tests.wire.exchanges import MODEL_DECIDES, REQUESTS
from tests.wire.wire import REASONS, differences, exchange, view

FOLDER = Path(__file__).parent / "wire"
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
SCHEMA_ANSWER = '{"name": "Ann", "age": 31}'
ROUTES = {id_: request for id_, *request in REQUESTS if request[1].startswith("/v1/")}
# The words of llama-server's own refusal are passed on by Ollama; here the refusal is in plain words.
PLAINER = {"v1-chat-image"}
# Ollama's llama-server doesn't embed with a chat model; embed.jsonl has the answers.
ELSEWHERE = {"v1-embeddings", "v1-embeddings-list", "v1-embeddings-base64"}


def say_plainly(request: Request, prompt: str) -> str:
    if request.constraint is not None:
        return SCHEMA_ANSWER
    return "Hi." if request.max_tokens == 4 else "I'm so glad you're here."


def say_thoughts(request: Request, prompt: str) -> str:
    if "Italy" not in prompt:
        return "Paris</th>"
    thought = "It is France.</think>Paris."
    return thought if prompt.endswith("<think>") else "<think>" + thought


SERVERS: dict[str, Any] = {
    "smollm2": lambda: scripted(say_plainly),
    "tools": lambda: scripted(lambda *_: CALL, template=TOOLS),
    "thinking": lambda: scripted(say_thoughts, template=THINKING),
    "embed": lambda: scripted(say_plainly),
}


def recorded(name: str) -> dict[str, Any]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["id"]: one for one in map(json.loads, lines) if one["id"] in ROUTES}


def compared() -> Iterator[tuple[str, str]]:
    for name in SERVERS:
        for id_ in recorded(name):
            if not (name == "smollm2" and id_ in ELSEWHERE):
                yield name, id_


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(loopback(make())) for name, make in SERVERS.items()}


@pytest.mark.parametrize(("name", "id_"), list(compared()))
def test_recorded(urls: dict[str, str], name: str, id_: str) -> None:
    wanted, found = view(recorded(name)[id_]), view(exchange(urls[name], *ROUTES[id_]))
    if id_ in PLAINER:
        assert found["status"] == wanted["status"]
        assert found["body"]["error"].keys() == wanted["body"]["error"].keys()
        return
    left = list(differences(wanted, found))
    if id_.startswith(MODEL_DECIDES):
        left = [one for one in left if not any(reason in one.split(":")[0] for reason in REASONS)]
    assert left == []

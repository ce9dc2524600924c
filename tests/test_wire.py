"""Every route compared with recorded responses of a real Ollama. Allowed differences are listed by id with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.model import ServedModel
from tests.loopback import THINKING, TOOLS, loopback, scripted
from tests.wire.exchanges import MODEL_DECIDES, REQUESTS
from tests.wire.wire import REASONS, differences, exchange, view

FOLDER = Path(__file__).parent / "wire"
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
Compare = Callable[[str, str, Sequence[str]], list[str]]

NO_OP = "managing models changes nothing here and answers with success for any well-formed name"
EMBEDS = "Ollama's llama-server refuses to embed with a chat model; embed.jsonl is the reference"
PLAINER = "Ollama passes on the JSON of the llama-server behind it; the same status in plain words"
JINJA = "a Hugging Face checkpoint has a Jinja template: one in Go's form is refused with a sentence"
OURS = {
    "delete-unknown": NO_OP,
    "copy-unknown": NO_OP,
    "create-unknown": NO_OP,
    "create-from": NO_OP,
    "generate-images": PLAINER,
    "generate-format-bad-schema": PLAINER,
    "generate-truncate-false": PLAINER,
    "chat-images": PLAINER,
    "v1-chat-image": PLAINER,
    "generate-template": JINJA,
    "generate-template-bad": JINJA,
    "embed": EMBEDS,
    "embed-two": EMBEDS,
    "embed-dimensions": EMBEDS,
    "embed-long": EMBEDS,
    "embeddings": EMBEDS,
    "v1-embeddings": EMBEDS,
    "v1-embeddings-list": EMBEDS,
    "v1-embeddings-base64": EMBEDS,
}
WITH_OLLAMAS_STATUS = {id_ for id_, reason in OURS.items() if reason is PLAINER}
BY_ID = {id_: request for id_, *request in REQUESTS}


def recorded(name: str, prefixes: Sequence[str] = ()) -> dict[str, Any]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    exchanges = {one["id"]: one for one in map(json.loads, lines)}
    return {id_: one for id_, one in exchanges.items() if not prefixes or id_.startswith(tuple(prefixes))}


def compared(
    url: str, name: str, prefixes: Sequence[str] = (), *, allowed: Mapping[str, str] = {}, ends: Mapping[str, str] = {}
) -> list[str]:
    """What differs from a recording, one line each.

    Args:
        allowed: ids that may differ; ``ends``: those that may end for another reason. Both with why.
    """
    found = []
    for id_, answer in recorded(name, prefixes).items():
        wanted, got = view(answer), view(exchange(url, *BY_ID[id_]))
        if id_ in allowed:
            if id_ in WITH_OLLAMAS_STATUS and (wanted["status"], list(wanted["body"])) != (
                got["status"],
                list(got["body"]),
            ):
                found.append(f"{id_}: another status or shape")
            continue
        left = list(differences(wanted, got))
        if id_.startswith(MODEL_DECIDES) or id_ in ends:
            left = [one for one in left if not any(reason in one.split(":")[0] for reason in REASONS)]
        found += [id_ + one for one in left]
    return found


def say_plainly(request: EngineRequest, prompt: str) -> str:
    if request.constraint is not None:
        return '{"name": "Ann", "age": 31}'
    if "Capital" in prompt:
        return "Paris."
    return "Hi." if request.max_tokens == 4 else "I'm so glad you're here."


def say_thoughts(request: EngineRequest, prompt: str) -> str:
    if "Italy" not in prompt:
        return "P</th>" if prompt.endswith("<|assistant|><think>") else "what it learned"
    answer = '{"city": "Paris"}' if request.constraint else "Paris."
    thought = f"It is about.</think>{answer}"
    return thought if prompt.endswith("<think>") else "<think>" + thought


MODELS: dict[str, Callable[[], ServedModel]] = {
    "smollm2": lambda: scripted(say_plainly, context_length=8192),
    "tools": lambda: scripted(lambda *_: CALL, template=TOOLS),
    "thinking": lambda: scripted(say_thoughts, template=THINKING),
}


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(loopback(make())) for name, make in MODELS.items()}


def test_a_chat_model(urls: dict[str, str]) -> None:
    assert compared(urls["smollm2"], "smollm2", allowed=OURS) == []


def test_a_model_that_knows_tools(urls: dict[str, str]) -> None:
    assert compared(urls["tools"], "tools", ["tools-"]) == []


def test_a_model_that_thinks(urls: dict[str, str]) -> None:
    assert compared(urls["thinking"], "thinking", ["thinking-"]) == []


def test_embeddings(urls: dict[str, str]) -> None:
    assert compared(urls["smollm2"], "embed") == []


# Exchanges of the command line that differ, and why.
CLI = {
    ("ollama --version", 0): "the version is the server's own",
    ("ollama run nosuch hi", 2): NO_OP,
    ("ollama pull wire", 1): NO_OP,
    ("ollama create made -f Modelfile   (FROM wire, SYSTEM, PARAMETER)", 1): NO_OP,
    ("ollama rm wire2", 1): "nothing was copied, so there is no wire2; the command goes on all the same",
    ("ollama rm wire2", 2): "as before",
    ("ollama rm made", 1): "nothing was created; the command goes on all the same",
    ("ollama rm made", 2): "as before",
}


def command_lines() -> list[tuple[str, int, dict[str, Any]]]:
    lines = map(json.loads, (FOLDER / "cli.jsonl").read_text(encoding="utf-8").splitlines())
    return [(one["command"], place, sent) for one in lines for place, sent in enumerate(one["exchanges"])]


def test_the_command_line(urls: dict[str, str]) -> None:
    url = urls["smollm2"]
    exchange(url, "POST", "/api/generate", {"model": "wire", "keep_alive": 0}, {})  # nothing was loaded at the time
    found = []
    for command, place, sent in command_lines():
        got = exchange(url, sent["method"], sent["path"], sent["body"], {})
        if (command, place) in CLI:
            assert got["status"] == (404 if " rm " in command else 200)
            continue
        kind = {"content-type": sent["content_type"]} if sent["content_type"] else {}
        answer = {"lines" if isinstance(sent["answer"], list) else "body": sent["answer"]}
        wanted = view({"status": sent["status"], "headers": kind, "framed": True, **answer})
        left = differences(wanted, view(got))
        # what the model says, and so where it ends, is another's
        found += [f"{command}: {one}" for one in left if "done_reason" not in one.split(":")[0]]
    assert found == []


def test_what_the_command_line_prints_is_there(urls: dict[str, str]) -> None:
    shown = exchange(urls["smollm2"], "POST", "/api/show", {"model": "", "name": "wire"}, {})["body"]
    assert shown["details"]["parameter_size"]
    assert shown["details"]["quantization_level"]
    assert shown["capabilities"] == ["completion"]
    (listed,) = exchange(urls["smollm2"], "GET", "/api/tags", None, {})["body"]["models"]
    assert (listed["name"], len(listed["digest"])) == ("wire:latest", 64)

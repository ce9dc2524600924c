"""A model's own parameters: read from its files, shown, and used where a request is silent."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.ollama.parameters import Value, read_shown
from ollama_forge.serving.chat import Chat
from ollama_forge.serving.chat_backends import ChatSettings, LocalBackend, running_server
from ollama_forge.serving.engine.base import EngineRequest, SamplingParams
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.parameters import model_parameters
from tests.loopback import loopback, scripted

STATED = {
    "do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "typical_p": 0.9,
    "repetition_penalty": 1.05,
}  # fmt: skip
OWN: dict[str, Value] = {
    "num_predict": 7, "repeat_penalty": 1.05, "seed": 5, "stop": ("###", "é"), "temperature": 0.6, "top_k": 20,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}]
RESPONSES = {"model": "wire", "input": "hi", "stream": False}
CHAT = {"model": "wire", "messages": MESSAGES, "stream": False}
APIS: dict[str, tuple[dict[str, Any], float, float]] = {  # a silent request; top_p and temperature where nobody says
    "/api/chat": (CHAT, 0.9, 0.8),
    "/api/generate": ({"model": "wire", "prompt": "hi", "stream": False}, 0.9, 0.8),
    "/v1/chat/completions": (CHAT, 1.0, 1.0),
    "/v1/completions": ({"model": "wire", "prompt": "hi"}, 1.0, 1.0),
    "/v1/responses": (RESPONSES, 1.0, 1.0),
    "/v1/messages": (CHAT, 0.9, 0.8),
}
_LIMITS = {"/v1/messages": "max_tokens", "/v1/responses": "max_output_tokens"}


def folder(at: Path, stated: dict[str, Any]) -> Checkpoint:
    at.mkdir(parents=True, exist_ok=True)
    (at / "generation_config.json").write_text(json.dumps(stated))
    return Checkpoint(at, at.name, "folder")


def test_the_generation_config_states_parameters(tmp_path: Path) -> None:
    assert model_parameters(folder(tmp_path, STATED)) == {
        "min_p": 0.0, "repeat_penalty": 1.05, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "typical_p": 0.9,
    }  # fmt: skip
    assert model_parameters(folder(tmp_path, {"do_sample": True, "temperature": True, "top_p": "1"})) == {}


def test_what_is_out_of_range_becomes_usable(tmp_path: Path) -> None:
    odd = {"temperature": -1, "top_k": -1, "top_p": 3, "repetition_penalty": 0}
    assert model_parameters(folder(tmp_path, odd)) == {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


def test_the_modelfile_of_a_run_takes_precedence(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "checkpoint", STATED)
    lines = "FROM ./mine.gguf\nPARAMETER temperature 0.2\nPARAMETER stop a b\nPARAMETER stop c\nPARAMETER seed -1\n"
    (tmp_path / "Modelfile").write_text(lines)
    assert model_parameters(checkpoint)["temperature"] == 0.6  # no run made this folder
    (checkpoint.folder / "abliteration.json").write_text("{}")
    found = model_parameters(checkpoint)
    assert (found["temperature"], found["stop"], found["top_k"]) == (0.2, ("a b", "c"), 20)
    assert "seed" not in found  # -1 is a new seed each time


@pytest.fixture(scope="module")
def model() -> ServedModel:
    model = scripted(lambda request, prompt: "Paris, of course.")
    model.metadata = replace(model.metadata, parameters=OWN)
    return model


@pytest.fixture(scope="module")
def url(model: ServedModel) -> Iterator[str]:
    with loopback(model) as url:
        yield url


def asked(url: str, model: ServedModel, path: str, body: dict[str, Any]) -> EngineRequest:
    """The request that the engine gets."""
    httpx.post(url + path, json=body).raise_for_status()
    engine: Any = model.engine
    request: EngineRequest = engine.requests[-1]
    return request


@pytest.mark.parametrize("path", APIS)
def test_a_silent_request_is_sampled_as_the_model_states(url: str, model: ServedModel, path: str) -> None:
    body, top_p, _ = APIS[path]
    limit = {"max_tokens": 50} if path == "/v1/messages" else {}  # where clients must state one
    request = asked(url, model, path, {**body, **limit})
    assert request.sampling == SamplingParams(temperature=0.6, top_k=20, top_p=top_p, repeat_penalty=1.05, seed=5)
    assert request.max_tokens == limit.get("max_tokens", 7)


@pytest.mark.parametrize("path", APIS)
def test_what_a_request_states_wins(url: str, model: ServedModel, path: str) -> None:
    body = APIS[path][0]
    if path.startswith("/api/"):
        stated = {"options": {"temperature": 0, "seed": 9, "num_predict": 3}}
    else:
        stated = {"temperature": 0, "seed": 9, _LIMITS.get(path, "max_tokens"): 3}
    request = asked(url, model, path, {**body, **stated})
    assert request.sampling == SamplingParams(0.0, 20, APIS[path][1], repeat_penalty=1.05, seed=9)
    assert request.max_tokens == 3


def test_the_apis_keep_their_defaults_where_the_model_states_nothing() -> None:
    model = scripted(lambda request, prompt: "Paris.")
    with loopback(model) as url:
        for path, (body, top_p, temperature) in APIS.items():
            request = asked(url, model, path, {**body, "max_tokens": 50})
            assert request.sampling == SamplingParams(temperature=temperature, top_p=top_p), path


def test_stop_strings_of_the_model(url: str) -> None:
    def said(options: dict[str, Any]) -> str:
        answer = httpx.post(f"{stopping}/api/chat", json={**CHAT, "options": options}).json()
        return str(answer["message"]["content"])

    model = scripted(lambda request, prompt: "one two three")
    model.metadata = replace(model.metadata, parameters={"stop": (" two",)})
    with loopback(model) as stopping:
        assert (said({}), said({"stop": [" three"]}), said({"stop": []})) == ("one", "one two", "one two three")


def test_show_prints_them(url: str) -> None:
    shown = httpx.post(f"{url}/api/show", json={"model": "wire"}).json()
    assert shown["parameters"].split("\n")[:3] == [
        'stop                           "###"',
        'stop                           "é"',
        "num_predict                    7",
    ]
    assert read_shown(shown["parameters"]) == OWN
    assert "\nPARAMETER temperature 0.6\n" in shown["modelfile"]


def test_a_response_repeats_what_holds(url: str) -> None:
    response = httpx.post(f"{url}/v1/responses", json=RESPONSES).json()
    assert (response["temperature"], response["top_p"]) == (0.6, 1)
    assert (response["presence_penalty"], response["frequency_penalty"]) == (0, 0)
    stated = {"temperature": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1.5}
    response = httpx.post(f"{url}/v1/responses", json={**RESPONSES, **stated}).json()
    assert {name: response[name] for name in stated} == stated


def test_the_terminal_chat_begins_with_them(url: str, model: ServedModel) -> None:
    found = running_server(url, "wire")
    assert found is not None
    for backend in (found, LocalBackend(model)):
        chat = Chat(backend)
        sampling = chat.settings.sampling
        assert (sampling.temperature, sampling.top_k, sampling.repeat_penalty, sampling.top_p) == (0.6, 20, 1.05, 0.9)
        assert chat.settings.num_predict == ChatSettings().num_predict
        assert backend.parameters["stop"] == OWN["stop"]
        chat.command("/set temperature 0.1")
        assert chat.settings.sampling.temperature == 0.1
        chat.command("/set temperature default")
        assert chat.settings.sampling.temperature == 0.6


def test_the_stop_strings_of_the_model_end_answers_in_the_terminal() -> None:
    model = scripted(lambda request, prompt: "one two three")
    model.metadata = replace(model.metadata, parameters={"stop": (" two",)})
    out = io.StringIO()
    Chat(LocalBackend(model), out).loop(["hi"])
    assert out.getvalue() == "one\n"

"""Ollama's routes: names, loading, options, formats, and error responses."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ollama_forge.serving.api.ollama.options import Options
from ollama_forge.serving.api.ollama.requests import parse_keep_alive
from ollama_forge.serving.engine.base import EngineRequest, SamplingParams
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelName, servable_name
from ollama_forge.serving.requests import BadRequest
from tests.fake_ollama import recorded
from tests.loopback import THINKING, TOOLS, loopback, scripted
from tests.test_api_security import call

GENERATE = {"model": "wire", "prompt": "hi", "stream": False}
HI = [{"role": "user", "content": "hi"}]


def seen(request: EngineRequest, prompt: str) -> str:
    return "I see " + prompt


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return scripted(seen)


@pytest.fixture(scope="module")
def url(model: ServedModel) -> Iterator[str]:
    with loopback(model) as url:
        yield url


def post(url: str, path: str, body: Any) -> Any:
    status, _, answer = call(url, "POST", path, body)
    assert status == 200, answer
    return json.loads(answer)


def refused(url: str, path: str, body: Any) -> tuple[int, str]:
    status, _, answer = call(url, "POST", path, body)
    assert status >= 400, answer
    return status, json.loads(answer)["error"]


# --- names


@pytest.mark.parametrize(
    "name",
    ["wire", "WIRE", "wire:latest", "library/wire", "registry.ollama.ai/library/wire:latest", "Wire:LATEST",
     "https://registry.ollama.ai/library/wire"],
)  # fmt: skip
def test_names_of_the_model(url: str, name: str) -> None:
    assert post(url, "/api/generate", {**GENERATE, "model": name})["model"] == name
    assert post(url, "/api/chat", {"model": name, "messages": HI, "stream": False})["model"] == name
    assert post(url, "/api/embed", {"model": name, "input": "a"})["model"] == name
    assert "template" in post(url, "/api/show", {"model": "", "name": name})


OTHERS = ["wire:other", "other/wire", "ollama.com/library/wire", "wir", ""]


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_no_model(url: str, name: str) -> None:
    assert refused(url, "/api/generate", {**GENERATE, "model": name}) == (404, f"model '{name}' not found")
    assert refused(url, "/api/embed", {"model": name, "input": "a"}) == (
        404,
        f'model "{name}" not found, try pulling it first',
    )


@pytest.mark.parametrize("name", ["a/b/c/wire", "wire:", "a b"])
def test_invalid_names(url: str, name: str) -> None:
    assert refused(url, "/api/generate", {**GENERATE, "model": name}) == (400, "invalid model name")
    assert refused(url, "/api/embed", {"model": name, "input": "a"}) == (400, "invalid model name")


def test_a_name_with_namespace_and_tag() -> None:
    named = scripted(seen)
    named.name = "openai/gpt:20b"
    with loopback(named) as url:
        assert json.loads(call(url, "GET", "/api/tags")[2])["models"][0]["name"] == "openai/gpt:20b"
        assert json.loads(call(url, "GET", "/v1/models")[2])["data"][0]["id"] == "openai/gpt:20b"
        assert post(url, "/api/generate", {**GENERATE, "model": "OpenAI/gpt:20b"})["done"]
        assert refused(url, "/api/generate", {**GENERATE, "model": "openai/gpt"})[0] == 404


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("a", "a:latest"),
        ("registry.ollama.ai/library/a:b", "a:b"),
        ("me/a", "me/a:latest"),
        ("hf.co/me/a:Q4_K_M", "hf.co/me/a:Q4_K_M"),
        ("localhost:5000/library/a", "localhost:5000/library/a:latest"),
    ],
)
def test_short_names(text: str, short: str) -> None:
    name = ModelName.parse(text)
    assert name is not None
    assert name.short == short


@pytest.mark.parametrize("text", ["a b", "../x", "-a", "a/../b", "a:", "a:b:c", "a/b/c/d", "a" * 81, "é"])
def test_no_names(text: str) -> None:
    assert ModelName.parse(text) is None


def test_any_label_can_be_served() -> None:
    assert servable_name("/tmp/my model (2)") == "my-model-2-"
    assert servable_name("openai/gpt:20b") == "openai/gpt:20b"
    assert servable_name("...") == "model"


# --- loading


def running(url: str) -> list[str]:
    return [one["name"] for one in json.loads(call(url, "GET", "/api/ps")[2])["models"]]


@pytest.mark.parametrize("zero", [0, "0", "0s", "0h0m", 0.0])
def test_unloaded_until_the_next_request(url: str, zero: Any) -> None:
    post(url, "/api/generate", {"model": "wire"})
    assert running(url) == ["wire:latest"]
    assert post(url, "/api/generate", {"model": "wire", "keep_alive": zero})["done_reason"] == "unload"
    assert running(url) == []
    assert post(url, "/api/chat", {"model": "wire", "messages": HI, "stream": False})["done"]
    assert running(url) == ["wire:latest"]
    assert post(url, "/api/chat", {"model": "wire", "keep_alive": zero})["done_reason"] == "unload"
    assert running(url) == []
    call(url, "POST", "/v1/chat/completions", {"model": "wire", "messages": HI})
    assert running(url) == ["wire:latest"]


def test_loading_generates_nothing(url: str, model: ServedModel) -> None:
    engine: Any = model.engine
    before = engine.served
    for path in ("/api/generate", "/api/chat"):
        for extra in ({}, {"stream": True}, {"keep_alive": "5m"}, {"options": {"num_ctx": 99}}):
            answer = post(url, path, {"model": "wire", **extra})
            assert (answer["done"], answer["done_reason"]) == (True, "load")
            assert "eval_count" not in answer
    assert engine.served == before


def test_an_answer_that_unloads(url: str) -> None:
    assert post(url, "/api/generate", {**GENERATE, "keep_alive": 0})["done_reason"] == "stop"
    assert running(url) == []


def test_how_long_it_is_kept(url: str) -> None:
    post(url, "/api/generate", {"model": "wire", "keep_alive": "10m"})
    until = json.loads(call(url, "GET", "/api/ps")[2])["models"][0]["expires_at"]
    assert 500 < time.mktime(time.strptime(until[:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime()) < 700


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        (300, 300),
        (1.5, 1.5),
        (-1, math.inf),
        ("5m", 300),
        ("1h30m", 5400),
        ("-1m", math.inf),
        ("1.5s", 1.5),
        ("0", 0),
        ("250ms", 0.25),
        ("1us", 1e-6),
        ("9999999h", math.inf),
    ],
)
def test_keep_alive(value: Any, seconds: float | None) -> None:
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize("value", ["soon", "", "5", "5 m", "m", True, [], {}, "1h-5m", "--1s"])
def test_no_keep_alive(value: Any) -> None:
    with pytest.raises(BadRequest):
        parse_keep_alive(value)


# --- options


def test_options_reach_the_engine(url: str, model: ServedModel) -> None:
    options = {"temperature": 0.5, "top_k": 7.0, "top_p": 0.25, "min_p": 0.125, "typical_p": 0.75, "seed": 5,
               "repeat_penalty": 1.5, "repeat_last_n": -1, "presence_penalty": 0.5, "frequency_penalty": 2,
               "num_predict": 3, "unknown": [1], "num_keep": None, "use_mmap": True}  # fmt: skip
    answer = post(url, "/api/generate", {**GENERATE, "options": options})
    assert (answer["eval_count"], answer["done_reason"]) == (3, "length")
    engine: Any = model.engine
    wanted = SamplingParams(0.5, 7, 0.25, 0.125, 0.75, 1.5, -1, 0.5, 2.0, 5)
    assert (engine.requests[-1].sampling, engine.requests[-1].max_tokens) == (wanted, 3)


def test_default_options() -> None:
    assert Options.read({}).sampling == SamplingParams(0.8, 40, 0.9, 0.0, 1.0, 1.0, 64, 0.0, 0.0, None)
    assert (Options.read({}).num_predict, Options.read({}).num_ctx, Options.read({}).stop) == (-1, None, ())


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"seed": -1}, "seed", None),
        ({"seed": 0}, "seed", 0),
        ({"temperature": -1}, "temperature", 0.0),
        ({"top_p": 7}, "top_p", 1.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 40.9}, "top_k", 40),
        ({"repeat_penalty": 0}, "repeat_penalty", 1.0),
        ({"repeat_last_n": -7}, "repeat_last_n", -1),
        ({"min_p": -1}, "min_p", 0.0),
        ({"typical_p": 3}, "typical_p", 1.0),
    ],
)
def test_odd_options(given: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(Options.read(given).sampling, field) == value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": "x"}, 'option "top_k" must be of type integer'),
        ({"num_ctx": True}, 'option "num_ctx" must be of type integer'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({"num_gpu": "all"}, 'option "num_gpu" must be of type integer'),
    ],
)
def test_options_of_another_type(url: str, given: dict[str, Any], says: str) -> None:
    for path in ("/api/generate", "/api/chat"):
        assert refused(url, path, {**GENERATE, "messages": HI, "options": given}) == (500, says)


def test_no_tokens(url: str) -> None:
    for path in ("/api/generate", "/api/chat"):
        answer = post(url, path, {**GENERATE, "messages": HI, "options": {"num_predict": 0}})
        assert (answer["done_reason"], answer.get("eval_count", 0)) == ("length", 0)
        assert not answer.get("response")


def test_stop(url: str) -> None:
    asked = {**GENERATE, "raw": True, "prompt": "abcdefg", "options": {"stop": ["def"]}}
    answer = post(url, "/api/generate", asked)
    assert (answer["response"], answer["done_reason"]) == ("I see abc", "stop")
    streamed = call(url, "POST", "/api/generate", {**asked, "stream": True})[2].decode()
    assert "".join(json.loads(line)["response"] for line in streamed.splitlines()) == "I see abc"


# --- generate


def test_system_and_context(url: str) -> None:
    first = post(url, "/api/generate", {**GENERATE, "system": "Be brief."})
    assert first["response"] == "I see Be brief."
    second = post(url, "/api/generate", {**GENERATE, "prompt": "more", "context": first["context"]})
    assert "Be brief." in second["response"]
    assert second["prompt_eval_count"] > len(first["context"])
    assert second["context"][: len(first["context"])] == first["context"]


def test_raw(url: str) -> None:
    answer = post(url, "/api/generate", {**GENERATE, "raw": True, "prompt": "as it is"})
    assert answer["response"] == "I see as it is"
    assert "context" not in answer
    for extra in ({"system": "x"}, {"template": "x"}, {"context": [1]}):
        status, says = refused(url, "/api/generate", {**GENERATE, "raw": True, **extra})
        assert (status, says) == (400, "raw mode does not support template, system, or context")


def test_a_template_of_the_request_is_refused(url: str) -> None:
    status, says = refused(url, "/api/generate", {**GENERATE, "template": "{{ .Prompt }}"})
    assert status == 400
    assert "Jinja" in says


def test_times_and_dates(url: str) -> None:
    answer = post(url, "/api/generate", GENERATE)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", answer["created_at"])
    parts = answer["load_duration"] + answer["prompt_eval_duration"] + answer["eval_duration"]
    assert 0 < parts <= answer["total_duration"] < 60e9


# --- typing, as Go does it


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "wire", "prompt": "hi", "stream": false} and more',
        b'\n\t {"model": "wire", "prompt": "hi", "stream": false}',
        b'{"MODEL": "wire", "Prompt": "hi", "STREAM": false}',
        b'{"model": "wire", "prompt": "hi", "stream": false, "suffix": null, "images": null, "options": null}',
        b'{"model": "wire", "prompt": "hi", "stream": false, "x": ' + b"[" * 9_999 + b"]" * 9_999 + b"}",
        b'{"model": "wire", "prompt": "hi", "stream": false, "x": ' + b'{"a":' * 9_999 + b"1" + b"}" * 9_999 + b"}",
        b'{"model": "wire", "prompt": "hi", "stream": false, "x": ' + b"9" * 6000 + b"}",
    ],
)  # fmt: skip
def test_generous(url: str, body: bytes) -> None:
    assert post(url, "/api/generate", body)["done"]


@pytest.mark.parametrize("text", [b"\xff", b"\\ud800", b"\\uDC00", b"\\ud800\\u0041", b"\xed\xa0\x80"])
def test_what_is_no_text_becomes_a_replacement(url: str, text: bytes) -> None:
    body = b'{"model": "wire", "raw": true, "stream": false, "prompt": "a' + text + b'\\\\ud800"}'
    said = post(url, "/api/generate", body)["response"]
    assert said.startswith("I see a\ufffd")
    assert said.endswith("\\ud800")  # an escaped backslash begins no escape


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b" \n", "missing request body"),
        (b'{"model": "wire", "prompt": NaN}', "invalid character 'N' looking for beginning of value"),
        (b'{"model": "wire", "x": -Infinity}', "invalid character"),
        (b'{"model": "wire", "x": 01}', "invalid character"),
        (b'{"model": "wire" "x": 1}', "invalid character"),
        (b'{"model": "wire", "x": "a', "unexpected EOF"),
        (b'{"model": "wire", "x": [1', "unexpected EOF"),
        (b'{"model": "wire", "x": ' + b"[" * 9_000, "unexpected EOF"),
        (b'{"model": "wire", "x": ' + b"[" * 9_000 + b"NaN", "invalid character"),
        (b'{"model": "wire", "x": ' + b"[" * 10_001 + b"]" * 10_001 + b"}", "exceeded max depth"),
        (b"[]", "cannot unmarshal array into Go value of type api.GenerateRequest"),
        (b'"x"', "cannot unmarshal string"),
        (b'{"model": "wire", "stream": 1}', "GenerateRequest.stream of type bool"),
        (b'{"model": "wire", "context": ["a"]}', "GenerateRequest.context of type int"),
        (b'{"model": "wire", "images": "x"}', "GenerateRequest.images of type []string"),
        (b'{"model": "wire", "images": ["abc$"]}', "illegal base64 data at input byte 3"),
        (b'{"model": "wire", "top_logprobs": 1.5}', "GenerateRequest.top_logprobs of type int"),
    ],
)
def test_strict(url: str, body: bytes, says: str) -> None:
    status, error = refused(url, "/api/generate", body)
    assert status == 400
    assert says in error


# --- format, think, tools, images


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_format(url: str, model: ServedModel, path: str) -> None:
    engine: Any = model.engine
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    wanted = {"json": {"type": "object"}, "": None}
    for given, text in [*wanted.items(), (None, None), (schema, schema)]:  # type: ignore[list-item]
        post(url, path, {**GENERATE, "messages": HI, "format": given})
        constraint = engine.requests[-1].constraint
        assert (constraint and json.dumps(json.loads(constraint.schema))) == (text and json.dumps(text))
    for wrong in ("yaml", 5, True, []):
        status, says = refused(url, path, {**GENERATE, "messages": HI, "format": wrong})
        assert status == 500
        assert says.startswith("invalid format: ")
    assert refused(url, path, {**GENERATE, "messages": HI, "format": {"type": "nonsense"}})[0] == 400
    head = json.dumps({**GENERATE, "messages": HI, "format": 0})[:-2].encode()
    assert refused(url, path, head + b'{"items":' * 3000 + b"1" + b"}" * 3001)[0] == 400


def test_think_and_tools_are_refused_where_unknown(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    asked = {"model": "wire", "messages": HI}
    assert refused(url, "/api/chat", {**asked, "think": True}) == (400, '"wire" does not support thinking')
    full = "registry.ollama.ai/library/wire:latest"
    assert refused(url, "/api/chat", {**asked, "tools": [tool]}) == (400, f"{full} does not support tools")
    assert refused(url, "/api/generate", {**GENERATE, "suffix": "x"}) == (400, f"{full} does not support insert")
    picture = base64.b64encode(b"png").decode()
    assert refused(url, "/api/generate", {**GENERATE, "images": [picture]})[0] == 400
    seen = [{"role": "user", "content": "x", "images": [picture]}]
    assert refused(url, "/api/chat", {**asked, "messages": seen})[0] == 400
    for wrong in (5, [], {}):
        assert refused(url, "/api/chat", {**asked, "think": wrong})[0] == 400


def test_logprobs(url: str) -> None:
    asked = {**GENERATE, "raw": True, "prompt": "a\u00e9", "logprobs": True}
    answer = post(url, "/api/generate", asked)
    assert bytes(byte for one in answer["logprobs"] for byte in one["bytes"]).decode() == answer["response"]
    lines = call(url, "POST", "/api/generate", {**asked, "stream": True})[2].splitlines()
    assert [one for line in map(json.loads, lines) for one in line.get("logprobs", [])] == answer["logprobs"]
    answer = post(url, "/api/chat", {"model": "wire", "messages": HI, "stream": False, "logprobs": True})
    assert len(answer["logprobs"]) == answer["eval_count"] - 1  # the end has none
    assert all("top_logprobs" not in one for one in answer["logprobs"])
    answer = post(url, "/api/generate", {**GENERATE, "logprobs": True, "top_logprobs": 20})
    assert {len(one["top_logprobs"]) for one in answer["logprobs"]} == {20}
    for wrong in (-1, 21):
        assert refused(url, "/api/generate", {**GENERATE, "top_logprobs": wrong})[0] == 400


def test_calls_and_thoughts() -> None:
    call_text = '{"name": "f", "arguments": {"a": [1, {"b": null}]}}'
    history = [
        *HI,
        {"role": "Assistant", "thinking": "hm", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_name": "f", "content": "11"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with loopback(scripted(lambda *_: call_text, template=TOOLS)) as url:
        asked = {"model": "wire", "messages": history, "tools": [tool], "stream": False}
        answer = post(url, "/api/chat", asked)
        (made,) = answer["message"]["tool_calls"]
        assert re.fullmatch(r"call_[a-z0-9]{8}", made["id"])
        assert made["function"] == {"index": 0, "name": "f", "arguments": {"a": [1, {"b": None}]}}
        assert (answer["message"]["content"], answer["done_reason"]) == ("", "stop")
        assert post(url, "/api/chat", {**asked, "tools": [{"type": "function"}]})["done"]
        assert post(url, "/api/chat", {**asked, "tools": []})["message"]["content"] == call_text
    with loopback(scripted(lambda *_: "thought</think>said", template=THINKING)) as url:
        asked = {"model": "wire", "messages": HI, "stream": False}
        answer = post(url, "/api/chat", asked)["message"]
        assert (answer["thinking"], answer["content"]) == ("thought", "said")
        assert "thinking" not in post(url, "/api/chat", {**asked, "think": False})["message"]


# --- streams that fail, and embeddings


def test_a_stream_that_fails_says_so_in_its_last_line() -> None:
    with loopback(scripted(lambda *_: "hello", fail_after=2)) as url:
        for path in ("/api/generate", "/api/chat"):
            status, headers, body = call(url, "POST", path, {**GENERATE, "messages": HI, "stream": True})
            assert (status, headers["content-type"]) == (200, "application/x-ndjson")
            lines = [json.loads(line) for line in body.splitlines()]
            assert lines[-1] == {"error": "the engine failed"}
            assert len(lines) == 3
            assert refused(url, path, {**GENERATE, "messages": HI}) == (500, "the engine failed")


def test_embeddings(url: str) -> None:
    many = post(url, "/api/embed", {"model": "wire", "input": ["a", "bc"]})
    assert [post(url, "/api/embed", {"model": "wire", "input": text})["embeddings"][0] for text in ("a", "bc")] == many[
        "embeddings"
    ]
    assert many["prompt_eval_count"] == 3
    assert post(url, "/api/embeddings", {"model": "wire", "prompt": "a"}) == {"embedding": many["embeddings"][0]}
    (short,) = post(url, "/api/embed", {"model": "wire", "input": "a", "dimensions": 4})["embeddings"]
    assert (len(short), round(sum(x * x for x in short), 6)) == (4, 1.0)
    assert refused(url, "/api/embed", {"model": "wire", "input": ["", "a"]})[0] == 400
    for wrong in (5, ["a", 5], {}, True, False, [["a"]], 0):
        assert refused(url, "/api/embed", {"model": "wire", "input": wrong}) == (400, "invalid input type")


# --- managing


def test_the_account_is_signed_out_as_recorded(url: str) -> None:
    """``ollama push`` asks for the account first, and says its own sentence where there is none."""
    answers = {each["path"]: each for each in recorded("templates.jsonl")}
    assert refused(url, "/api/me", {}) == (401, "unauthorized")
    assert "signin_url" not in json.loads(call(url, "POST", "/api/me")[2])
    for path, method in (("/api/signout", "POST"), ("/api/status", "GET")):
        status, _, text = call(url, method, path)
        assert (status, json.loads(text)) == (answers[path]["status"], answers[path]["answer"])
    assert call(url, "GET", "/api/me")[0] == 405


def test_managing(url: str) -> None:
    for path in ("/api/pull", "/api/push"):
        lines = call(url, "POST", path, {"model": "some/other:tag"})[2].splitlines()
        assert json.loads(lines[-1]) == {"status": "success"}
        assert len(lines) > 1
        assert post(url, path, {"name": "other", "stream": False}) == {"status": "success"}
        assert refused(url, path, {"model": "a b"}) == (400, "invalid model name")
    made = {"model": "new", "files": {"a.gguf": "sha256:" + "0" * 64}, "stream": False}
    assert post(url, "/api/create", made) == {"status": "success"}
    assert refused(url, "/api/create", {**made, "files": []})[0] == 400
    assert call(url, "POST", "/api/copy", {"source": "a", "destination": "b"})[0] == 200
    says = 'destination "../b" is invalid'
    assert refused(url, "/api/copy", {"source": "a", "destination": "../b"}) == (400, says)
    assert call(url, "DELETE", "/api/delete", {"model": "", "name": "x"})[0] == 200
    assert call(url, "DELETE", "/api/delete", {"model": "x y"})[0] == 400
    digest = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert call(url, "POST", f"/api/blobs/{digest}", b"hello")[0] == 201
    assert call(url, "HEAD", f"/api/blobs/{digest}")[0] == 404
    assert [one["name"] for one in json.loads(call(url, "GET", "/api/tags")[2])["models"]] == ["wire:latest"]

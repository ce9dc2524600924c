"""What agents and their libraries ask for: forced calls, several answers, counts, errors in streams, refused fields."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import tomllib
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import anthropic.types
import jsonschema
import ollama
import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from llguidance import LLMatcher
from pydantic import TypeAdapter

from ollama_forge.serving import threads
from ollama_forge.serving.api import body as api_body
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.json_schema import calls_grammar, check_schema, violation
from ollama_forge.serving.engine.transformers import TransformersEngine
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.prompts import PromptBuilder
from ollama_forge.serving.requests import Delta, Done, Event, GenerationRequest, Message
from ollama_forge.serving.tools.families import family_of
from ollama_forge.serving.tools.forced import forced_calls, plain_call_schema
from ollama_forge.serving.tools.parser import ToolCallParser
from tests.byte_tokenizer import tokenizer as byte_tokenizer
from tests.engines import load
from tests.loopback import FACTS, THINKING, TOOLS, loopback, scripted
from tests.test_api_streams import engine_of, post

HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "wire", "messages": HI},
    TEXT: {"model": "wire", "prompt": "hi"},
    RESPONSES: {"model": "wire", "input": "hi"},
    MESSAGES: {"model": "wire", "messages": HI, "max_tokens": 400},
    "/api/chat": {"model": "wire", "messages": HI},
    "/api/generate": {"model": "wire", "prompt": "hi"},
}
TOOLS_OF = {
    CHAT: [
        {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
        {"type": "function", "function": {"name": "get_time", "parameters": NOTHING}},
    ],
    RESPONSES: [
        {"type": "function", "name": "get_weather", "parameters": CITY},
        {"type": "function", "name": "get_time", "parameters": NOTHING},
    ],
    MESSAGES: [{"name": "get_weather", "input_schema": CITY}, {"name": "get_time", "input_schema": NOTHING}],
}
REQUIRED: dict[str, Any] = {CHAT: "required", RESPONSES: "required", MESSAGES: {"type": "any"}}
NAMED: dict[str, Any] = {
    CHAT: {"type": "function", "function": {"name": "get_time"}},
    RESPONSES: {"type": "function", "name": "get_time"},
    MESSAGES: {"type": "tool", "name": "get_time"},
}
TWO_CALLS = '{"name": "get_time", "arguments": {}}\n{"name": "get_weather", "arguments": {"city": "Rome"}}'


def answered(url: str, path: str, **more: Any) -> Any:
    status, text = post(url, path, {"stream": False, **BODIES[path], **more})
    assert status == 200, text
    return json.loads(text)


def events_of(url: str, path: str, **more: Any) -> list[Any]:
    """The events or lines of a streamed answer, validated by the types of the API's official client."""
    status, text = post(url, path, {**BODIES[path], **more, "stream": True})
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line[:1] == "{" or line[:6] == "data: "]
    found = [json.loads(line) for line in lines if line != "[DONE]"]
    for event in found:
        validate(path, event)
    return found


STREAMED: dict[str, Any] = {
    CHAT: openai.types.chat.ChatCompletionChunk,
    TEXT: openai.types.Completion,
    RESPONSES: openai.types.responses.ResponseStreamEvent,
    MESSAGES: anthropic.types.RawMessageStreamEvent,
    "/api/chat": ollama.ChatResponse,
    "/api/generate": ollama.GenerateResponse,
}


def validate(path: str, event: Any) -> None:
    if path == TEXT:
        for choice in event["choices"]:  # null until the end, although the type of a chunk's reason has no null
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    if event.get("content_block", {}).get("type") == "thinking":
        event["content_block"]["signature"] = ""  # Ollama sends none
    if path == RESPONSES and (usage := event.get("response", {}).get("usage")):
        usage["input_tokens_details"]["cache_write_tokens"] = 0  # as above
    adapter(path).validate_python(event)


@cache
def adapter(path: str) -> TypeAdapter[Any]:
    return TypeAdapter(STREAMED[path])


def calls_of(path: str, answer: Any) -> list[tuple[str, Any]]:
    """The calls of tools in an answer, as ``(name, arguments)``."""
    if path == CHAT:
        calls = answer["choices"][0]["message"].get("tool_calls", [])
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    if path == RESPONSES:
        items = [item for item in answer["output"] if item["type"] == "function_call"]
        return [(item["name"], json.loads(item["arguments"])) for item in items]
    return [(block["name"], block["input"]) for block in answer["content"] if block["type"] == "tool_use"]


# --- streams validated by the clients' types


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with loopback(scripted(lambda *_: "hello", template=TOOLS)) as base:
        yield base


@pytest.mark.parametrize("path", BODIES)
def test_streams_of_text_and_thoughts(path: str, url: str) -> None:
    assert len(events_of(url, path)) > 5
    with loopback(scripted(lambda *_: "Hm.</think>Yes.", template=THINKING)) as thinking:
        assert len(events_of(thinking, path)) > 4


@pytest.mark.parametrize("path", TOOLS_OF)
def test_streams_of_calls(path: str) -> None:
    with loopback(scripted(lambda *_: TWO_CALLS, template=TOOLS)) as url:
        text = json.dumps(events_of(url, path, tools=TOOLS_OF[path]))
    assert "get_time" in text
    assert "get_weather" in text


# --- errors while an answer is written


def broken(events: Callable[[GenerationRequest, Callable[[], None]], AsyncGenerator[Event]]) -> ServedModel:
    """A model whose answers are these events."""
    model = scripted(lambda *_: "")
    model.generate = events  # type: ignore[method-assign, assignment]
    return model


async def unwritable(request: GenerationRequest, ended: Callable[[], None]) -> AsyncGenerator[Event]:
    yield Delta("fine")
    yield Delta("\ud83d")  # no UTF-8
    yield Done("stop")


async def failing(request: GenerationRequest, ended: Callable[[], None]) -> AsyncGenerator[Event]:
    yield Delta("fine")
    raise KeyError("secret")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("events", [unwritable, failing])
def test_whatever_fails_ends_the_response_in_the_apis_error(path: str, events: Any) -> None:
    with loopback(broken(events)) as url:
        status, text = post(url, path, {**BODIES[path], "stream": False})
        assert status == 500
        error = json.loads(text)["error"]
        assert "internal server error" in (error if isinstance(error, str) else error["message"])
        status, text = post(url, path, {**BODIES[path], "stream": True})
    assert status == 200
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    error = last["response"]["error"] if "response" in last else last["error"]
    assert "internal server error" in (error if isinstance(error, str) else error["message"])
    assert "secret" not in text
    assert "fine" in text


def test_a_route_that_fails_is_an_error_of_its_api(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(body: bytes) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(api_body, "decode", fail)
    for path, body in BODIES.items():
        status, text = post(url, path, body)
        assert (status, "secret" in text) == (500, False)
        assert json.loads(text)["error"]


# --- tool_choice

TEMPLATES = {
    "hermes": "{# <tool_call> #}" + TOOLS,
    "llama": "{# Environment: ipython #}" + TOOLS,
    "mistral": "{# [TOOL_CALLS] #}" + TOOLS,
    "mistral with names": "{# [TOOL_CALLS][ARGS] #}" + TOOLS,
    "deepseek": "{# <｜tool▁calls▁begin｜> #}" + TOOLS,
    "deepseek with blocks": "{# <｜tool▁calls▁begin｜> ```json #}" + TOOLS,
    "xml": "{# <tool_call><function=x><parameter=y> #}" + TOOLS,
    "plain": TOOLS,
}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    """A model that writes anything, unless a grammar binds it."""
    engine = TransformersEngine(load(tmp_path_factory.mktemp("random")), slots=4)
    yield engine
    engine.close()


def served(engine: TransformersEngine, template: str | None = None) -> ServedModel:
    return ServedModel("wire", byte_tokenizer(), engine, FACTS, template=template)


class Kept:
    """An engine that outlives the server."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "template"), [*((CHAT, template) for template in TEMPLATES), (RESPONSES, "hermes"), (MESSAGES, "hermes")]
)
def test_a_forced_call_is_made_and_follows_its_schema(
    random_model: TransformersEngine, path: str, template: str
) -> None:
    one: Any = {} if path == MESSAGES else {"parallel_tool_calls": False}
    choices = [REQUIRED[path], NAMED[path]]
    if path == MESSAGES:
        choices = [{**choice, "disable_parallel_tool_use": True} for choice in choices]
    with loopback(served(Kept(random_model), TEMPLATES[template])) as url:  # type: ignore[arg-type]
        any_, named = (
            answered(url, path, tools=TOOLS_OF[path], tool_choice=choice, temperature=1.0, seed=3, **one)
            for choice in choices
        )
    (call,) = calls_of(path, any_)
    assert call in [("get_time", {}), ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert calls_of(path, named) == [("get_time", {})]
    if path == MESSAGES:
        assert [block["type"] for block in any_["content"]] == ["tool_use"]


REAL = tomllib.loads((Path(__file__).parent / "data" / "chat_templates.toml").read_text(encoding="utf-8"))
REAL_TEMPLATES = {model: row["template"] for model, row in REAL.items()}
REAL_TEMPLATES["phi without tags of calls"] = "<|tool|><|/tool|>"
SCHEMAS = {"get_weather": CITY, "get_time": NOTHING}


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("model", REAL_TEMPLATES)
def test_what_a_family_is_made_to_write_is_read_as_its_calls(model: str, several: bool) -> None:
    template = REAL_TEMPLATES[model]
    calls = forced_calls(template, SCHEMAS, channels=False, several=several)
    grammar = calls_grammar(calls, lambda text: [text])
    assert LLMatcher.validate_grammar_with_warnings(grammar) == (False, [])
    weather, now = calls.tools
    text = calls.begin + weather.opening + '{"city": "Rome"}' + weather.closing
    if calls.several:
        text += calls.separator + now.opening + "{}" + now.closing
    parser = ToolCallParser(family_of(template), SCHEMAS)
    read = [piece for letter in "\n\n" + text + calls.end for piece in parser.feed(letter)] + parser.end()
    made = [(call.name, call.arguments) for piece in read if not isinstance(piece, str) for call in piece]
    assert made == [("get_weather", {"city": "Rome"}), ("get_time", {})][: 1 + calls.several]
    assert all(not isinstance(piece, str) for piece in read)
    assert several or not calls.several


@pytest.mark.parametrize("path", TOOLS_OF)
def test_a_forced_call_comes_after_the_thought(path: str) -> None:
    template = "{# <tool_call> #}{% if tools %}{{ tools | tojson }}{% endif %}" + THINKING
    said = 'Hm.</think>\n\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    model = scripted(lambda *_: said, template=template)
    with loopback(model) as url:
        answer = answered(url, path, tools=TOOLS_OF[path], tool_choice=REQUIRED[path])
    assert calls_of(path, answer) == [("get_time", {})]
    (request,) = engine_of(model).requests
    assert "</think>" in str(request.constraint.after)
    assert len(request.constraint.calls.tools) == 2
    assert request.constraint.calls.several
    plain = json.loads(request.constraint.schema)
    jsonschema.validate({"name": "get_weather", "arguments": {"city": "Rome"}}, plain)
    for wrong in ({"name": "get_weather", "arguments": {"city": "Bonn"}}, {"name": "x", "arguments": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, plain)


def test_schemas_of_plain_calls_keep_their_references() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "size": {"$ref": "#/$defs/n"}}}
    schema = plain_call_schema({"f": {**tree, "$defs": {"n": {"type": "integer"}}}, "g": {}})
    call = {"name": "f", "arguments": {"next": {"size": 1}}}
    assert violation(schema, json.dumps(call)) is None
    assert violation(schema, json.dumps({**call, "arguments": {"next": {"size": "a"}}})) is not None
    assert check_schema(schema) is None


def test_harmony_has_its_thought_within_the_grammar() -> None:
    template = "{# <|channel|>analysis #}{% if tools %}{{ tools | tojson }}{% endif %}" + THINKING
    said = "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}"
    model = scripted(lambda *_: said, template=template)
    with loopback(model) as url:
        answer = answered(url, CHAT, tools=TOOLS_OF[CHAT], tool_choice=NAMED[CHAT])
    assert calls_of(CHAT, answer) == [("get_time", {})]
    (request,) = engine_of(model).requests
    (tool,) = request.constraint.calls.tools
    assert said == tool.opening + "{}"
    assert not request.constraint.after
    assert request.constraint.calls.thought == ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")


REFUSED_CHOICES = [
    (CHAT, {"tool_choice": "required"}, "there are no tools"),
    (CHAT, {"tools": TOOLS_OF[CHAT], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 'no tool "x"'),
    (CHAT, {"tools": TOOLS_OF[CHAT], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, 'no tool "x"'),
    (CHAT, {"tools": TOOLS_OF[CHAT], "tool_choice": {"type": "function"}}, "tool_choice: a tool has no name"),
    (CHAT, {"tools": TOOLS_OF[CHAT], "tool_choice": "often"}, 'invalid tool_choice: "often"'),
    (RESPONSES, {"tools": TOOLS_OF[RESPONSES], "tool_choice": {"type": "web_search"}}, '"web_search"'),
    (MESSAGES, {"tools": TOOLS_OF[MESSAGES], "tool_choice": {"type": "tool", "name": "x"}}, 'no tool "x"'),
    (MESSAGES, {"tools": TOOLS_OF[MESSAGES], "tool_choice": {"type": "some"}}, "invalid tool_choice"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "there are no tools"),
    (
        MESSAGES,
        {"tools": [{"name": "f", "input_schema": {"type": "nonsense"}}], "tool_choice": {"type": "any"}},
        'invalid parameters of "f"',
    ),
]


@pytest.mark.parametrize(("path", "more", "says"), REFUSED_CHOICES)
def test_choices_that_cannot_be_followed_are_refused(url: str, path: str, more: Any, says: str) -> None:
    status, text = post(url, path, {**BODIES[path], **more})
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
    assert says in json.loads(text)["error"]["message"]


def test_allowed_tools() -> None:
    model = scripted(lambda *_: "", template=TOOLS)
    named = {"type": "function", "function": {"name": "get_time"}}
    allowed = {"mode": "required", "tools": [named]}
    with loopback(model) as url:
        answered(url, CHAT, tools=TOOLS_OF[CHAT], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        flat = {"type": "allowed_tools", "mode": "auto", "tools": [NAMED[RESPONSES]]}
        answered(url, RESPONSES, tools=TOOLS_OF[RESPONSES], tool_choice=flat)
    first, second = engine_of(model).requests
    assert [tool.opening for tool in first.constraint.calls.tools] == ['{"name": "get_time", "arguments": ']
    assert second.constraint is None
    assert all(b"get_weather" not in bytes(map(ord, said)) for said in prompts_of(model))


def prompts_of(model: ServedModel) -> list[str]:
    return [model.tokenizer.decode(list(request.ids)) for request in engine_of(model).requests]


@pytest.mark.parametrize("path", TOOLS_OF)
def test_one_call_at_most(path: str) -> None:
    one: Any = {"parallel_tool_calls": False}
    if path == MESSAGES:
        one = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    with loopback(scripted(lambda *_: TWO_CALLS, template=TOOLS)) as url:
        answer = answered(url, path, tools=TOOLS_OF[path], **one)
        streamed = json.dumps(events_of(url, path, tools=TOOLS_OF[path], **one)[2:-1])
        both = answered(url, path, tools=TOOLS_OF[path])
    assert calls_of(path, answer) == [("get_time", {})]
    assert len(calls_of(path, both)) == 2
    assert "Rome" not in streamed


# --- schemas


def test_an_answer_that_breaks_what_was_loosened_is_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with loopback(scripted(lambda *_: '["secret","secret"]')) as url, caplog.at_level(logging.WARNING):
        answer = answered(url, CHAT, response_format=format_)
        assert answer["choices"][0]["message"]["content"] == '["secret","secret"]'
        assert "uniqueItems at $" in caplog.text
        assert "secret" not in caplog.text
        caplog.clear()
        del schema["uniqueItems"]
        answered(url, CHAT, response_format=format_)
        assert not caplog.text


def test_anthropics_output_format() -> None:
    model = scripted(lambda *_: "{}")
    format_ = {"type": "json_schema", "schema": CITY}
    with loopback(model) as url:
        answered(url, MESSAGES, output_config={"format": format_})
        answered(url, MESSAGES, output_format=format_)
        assert post(url, MESSAGES, {**BODIES[MESSAGES], "output_format": {"type": "xml"}})[0] == 400
    assert [json.loads(request.constraint.schema) for request in engine_of(model).requests] == [CITY, CITY]


# --- several answers


def test_n_answers() -> None:
    model = scripted(lambda request, _: f"seed {request.sampling.seed}")
    with loopback(model) as url:
        chat = answered(url, CHAT, n=3, seed=5)
        text = answered(url, TEXT, n=2, seed=5)
        one = answered(url, CHAT, seed=5)
        chunks = events_of(url, CHAT, n=3, seed=5, stream_options={"include_usage": True})
        pieces = events_of(url, TEXT, n=2, seed=5)
        answered(url, CHAT, n=2)
    assert [choice["index"] for choice in chat["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["seed 5", "seed 6", "seed 7"]
    assert [(choice["index"], choice["text"]) for choice in text["choices"]] == [(0, "seed 5"), (1, "seed 6")]
    assert chat["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert chat["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"]
    said = ["", "", ""]
    ends = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        said[choice["index"]] += choice["delta"].get("content") or ""
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert said == ["seed 5", "seed 6", "seed 7"]
    assert sorted(ends) == [0, 1, 2]
    assert chunks[-1]["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    assert "".join(p["choices"][0]["text"] for p in pieces if p["choices"][0]["index"] == 1) == "seed 6"
    assert [request.sampling.seed for request in engine_of(model).requests[-2:]] == [None, None]


def test_one_of_several_answers_that_fails_ends_all() -> None:
    model = scripted(lambda *_: "hello", fail_after=3)
    with loopback(model) as url:
        assert post(url, CHAT, {**BODIES[CHAT], "n": 3})[0] == 500
        assert "the engine failed" in post(url, CHAT, {**BODIES[CHAT], "n": 3, "stream": True})[1]
    assert engine_of(model).active == model.admission.running == 0


# --- fields

REFUSED_FIELDS = [
    (CHAT, {"n": 0}, "n must be"),
    (CHAT, {"n": 129}, "n must be"),
    (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True, "date": "x"}}, "chat_template_kwargs: date"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"guided_json": {"type": "object"}}, "guided_json is not supported: send response_format"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"response_format": {"type": "grammar"}}, '"grammar"'),
    (CHAT, {"response_format": {"type": "json_schema"}}, "schema is missing"),
    (TEXT, {"logit_bias": {"5": 1}}, "logit_bias"),
    (TEXT, {"echo": True}, "echo"),
    (TEXT, {"best_of": 2}, "best_of"),
    (CHAT, {"best_of": 2}, "best_of"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "send tool_calls"),
    (RESPONSES, {"n": 2}, "n is not supported"),
    (RESPONSES, {"include": ["everything"]}, "include: everything"),
    (MESSAGES, {"n": 2}, "n is not supported"),
    (MESSAGES, {"thinking": {"type": "sometimes"}}, "thinking.type"),
    (MESSAGES, {"output_config": {"effort": "banana"}}, "output_config.effort"),
    (TEXT, {"response_format": {"type": "json_object"}}, "response_format"),
    (TEXT, {"min_tokens": 5}, "min_tokens"),
    (RESPONSES, {"stop": ["x"]}, "stop is not supported"),
    (RESPONSES, {"max_tool_calls": 2}, "max_tool_calls"),
    (RESPONSES, {"previous_response_id": "r"}, "previous_response_id"),
    (RESPONSES, {"conversation": "c"}, "conversation"),
    (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"prompt": {"id": "p"}}, "prompt"),
    (RESPONSES, {"top_logprobs": 3}, "top_logprobs"),
    (RESPONSES, {"include": ["message.output_text.logprobs"]}, "logprobs"),
    (RESPONSES, {"truncation": "middle"}, "truncation"),
    (RESPONSES, {"text": {"format": {"type": "grammar"}}}, '"grammar"'),
    (MESSAGES, {"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
    (MESSAGES, {"container": "c"}, "container"),
    (MESSAGES, {"response_format": {"type": "json_object"}}, "output_config.format"),
    (CHAT, {"model": "a b"}, "invalid model name"),
    (TEXT, {"model": "../x"}, "invalid model name"),
    (RESPONSES, {"model": "a:"}, "invalid model name"),
    (MESSAGES, {"model": "a b"}, "invalid model name"),
    ("/api/generate", {"model": "a b"}, "invalid model name"),
]


@pytest.mark.parametrize(("path", "more", "says"), REFUSED_FIELDS)
def test_fields_that_cannot_be_honoured_are_refused_by_name(url: str, path: str, more: Any, says: str) -> None:
    status, text = post(url, path, {**BODIES[path], **more})
    assert status == 400, text
    error = json.loads(text)["error"]
    assert says in (error if isinstance(error, str) else error["message"])


def test_fields_that_change_nothing_are_taken(url: str) -> None:
    same: dict[str, Any] = {
        "logit_bias": {},
        "modalities": ["text"],
        "store": True,
        "user": "u",
        "metadata": {"a": "b"},
    }
    answered(url, CHAT, **same, service_tier="auto", prompt_cache_key="k", parallel_tool_calls=True)
    answered(url, TEXT, best_of=1, echo=False, user="u", response_format={"type": "text"}, min_tokens=0)
    codex = {"include": ["reasoning.encrypted_content"], "store": False, "parallel_tool_calls": True}
    answer = answered(url, RESPONSES, **codex, background=False, truncation="auto", prompt_cache_key="k")
    assert (answer["tool_choice"], answer["parallel_tool_calls"]) == ("auto", True)
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    answered(url, MESSAGES, context_management=edits, metadata={"user_id": "u"}, thinking={"type": "adaptive"})


def test_truncation_disabled_refuses_a_prompt_that_is_too_long() -> None:
    with loopback(scripted(lambda *_: "a", context_length=60)) as url:
        long = {**BODIES[RESPONSES], "input": "x" * 100}
        assert post(url, RESPONSES, long)[0] == 200
        assert post(url, RESPONSES, {**long, "truncation": "disabled"})[0] == 400


# --- the end of an answer, and counts


def test_a_response_that_is_cut_is_incomplete(url: str) -> None:
    answer = answered(url, RESPONSES, max_output_tokens=2)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    last = events_of(url, RESPONSES, max_output_tokens=2)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    whole = answered(url, RESPONSES)
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)


def test_count_tokens(url: str) -> None:
    asked = {"model": "wire", "messages": HI, "system": "Be brief.", "tools": TOOLS_OF[MESSAGES]}
    status, text = post(url, f"{MESSAGES}/count_tokens", asked)
    assert status == 200
    assert json.loads(text) == {"input_tokens": answered(url, MESSAGES, **asked)["usage"]["input_tokens"]}
    long = {**asked, "messages": [{"role": "user", "content": "x" * 9000}]}  # longer than the context
    assert json.loads(post(url, f"{MESSAGES}/count_tokens", long)[1])["input_tokens"] > 9000
    assert post(url, f"{MESSAGES}/count_tokens", {**asked, "model": "nosuch"})[0] == 404
    assert post(url, f"{MESSAGES}/count_tokens", {**asked, "messages": []})[0] == 400


def test_cached_tokens_are_counted(random_model: TransformersEngine) -> None:
    with loopback(served(Kept(random_model))) as url:  # type: ignore[arg-type]
        for path in (CHAT, RESPONSES, MESSAGES):
            limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
            words = f"{path} says the same thing again and again"
            turn = {"input": words} if path == RESPONSES else {"messages": [{"role": "user", "content": words}]}
            usages = [answered(url, path, **turn, **{limit: 2})["usage"] for _ in range(2)]
            streamed = events_of(url, path, **turn, **{limit: 2}, stream_options={"include_usage": True})[-2:]
            first, second = (cached_of(usage) for usage in usages)
            assert first < len("<|user|>" + words) <= second + 10
            assert cached_of(next(filter(None, map(usage_of, streamed)))) == second
            if path == MESSAGES:
                inputs = [usage["input_tokens"] + cached_of(usage) for usage in usages]
                assert inputs[0] == inputs[1]


def usage_of(event: Any) -> Any:
    return event.get("usage") or event.get("response", {}).get("usage")


def cached_of(usage: Any) -> int:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(details.get("cached_tokens", usage.get("cache_read_input_tokens", 0)))


# --- Ollama's own


def test_debug_render_only() -> None:
    def never(request: EngineRequest, prompt: str) -> str:
        raise AssertionError("nothing is to be generated")

    with loopback(scripted(never, template=TOOLS)) as url:
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": NOTHING}}
        answer = answered(url, "/api/chat", tools=[tool], _debug_render_only=True)
        rendered = answer.pop("_debug_info")["rendered_template"]
        assert answer.pop("created_at")
        assert answer == {"model": "wire", "message": {"role": "", "content": ""}, "done": False}
        assert json.loads(rendered.split("|>")[1].split("<|")[0])[0]["function"]["name"] == "f"
        assert rendered.endswith("<|user|>hi<|end|><|assistant|>")
        answer = answered(url, "/api/generate", system="Be brief.", _debug_render_only=True)
        assert answer["_debug_info"] == {
            "rendered_template": "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"
        }
        assert (answer["response"], answer["done"]) == ("", False)
        raw = answered(url, "/api/generate", raw=True, _debug_render_only=True)
        assert raw["_debug_info"]["rendered_template"] == "hi"


def test_show_with_another_system_prompt(url: str) -> None:
    shown = json.loads(post(url, "/api/show", {"model": "wire", "system": "Be brief."})[1])
    assert shown["system"] == "Be brief."
    assert 'SYSTEM """Be brief."""' in shown["modelfile"]
    assert "system" not in json.loads(post(url, "/api/show", {"model": "wire"})[1])


# --- Claude Code


def billed(cch: str, rest: str = "") -> list[dict[str, str]]:
    line = f"x-anthropic-billing-header: cc_version=2.1.120.cf9; cc_entrypoint=cli; cch={cch};{rest}"
    return [{"type": "text", "text": line}, {"type": "text", "text": "You are Claude Code."}]


def test_the_billing_line_does_not_keep_turns_from_sharing_their_prefix() -> None:
    model = scripted(lambda *_: "hello")
    with loopback(model) as url:
        for system in (billed("543cf"), billed("0aaa9"), billed("", "\n"), billed("1", "Kept."), "x-anthropic-y: z"):
            answered(url, MESSAGES, system=system)
    first, second, third, fourth, other = prompts_of(model)
    assert first == second == third
    assert "<|system|>You are Claude Code.<|end|>" in first
    assert "<|system|>Kept.You are Claude Code.<|end|>" in fourth
    assert "x-anthropic-y: z" in other


# --- nothing slow on the event loop


def test_much_is_done_in_a_worker_thread_and_little_at_once() -> None:
    async def where(size: int) -> int:
        return await threads.off_loop(size, threading.get_ident)

    assert asyncio.run(where(10)) == threading.get_ident()
    assert asyncio.run(where(threads.LARGE)) != threading.get_ident()


def test_large_bodies_are_read_in_a_worker_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    decode = api_body.decode

    def noted(body: bytes) -> Any:
        names.append(threading.current_thread().name)
        return decode(body)

    monkeypatch.setattr(api_body, "decode", noted)
    with loopback(scripted(lambda *_: "hello", context_length=1 << 20)) as url:
        for path, field in (("/api/generate", "prompt"), (CHAT, "user"), (RESPONSES, "instructions")):
            for size in (10, threads.LARGE):
                answered(url, path, **{field: "x" * size})
    assert [name.startswith("asyncio_") for name in names] == [False, True] * 3


def test_long_texts_are_tokenized_in_a_worker_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(lambda *_: "hello")
    names = []
    encode = model._encode_all

    def noted(texts: Any) -> Any:
        names.append(threading.current_thread().name)
        return encode(texts)

    monkeypatch.setattr(model, "_encode_all", noted)
    asyncio.run(model.embed(["a"] * 3))
    asyncio.run(model.embed(["a" * threads.LARGE] * 3))
    assert [name.startswith("asyncio_") for name in names] == [False, True]


def test_a_counted_prompt_has_the_models_own_system_prompt() -> None:
    prompts = PromptBuilder(byte_tokenizer(), TOOLS, 4096, system="Be brief.")
    whole = prompts.whole([Message("user", "hi")])
    assert whole.ids == prompts.chat([Message("user", "hi")]).ids
    assert "Be brief." in whole.text

"""Tools of OpenAI's APIs beyond functions: custom tools, namespaces, and tools that do not run at the client."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from ollama_forge.serving.api.anthropic.requests import MessagesRequest
from ollama_forge.serving.api.openai.requests import ChatCompletionRequest
from ollama_forge.serving.api.openai.responses_requests import ResponsesRequest
from ollama_forge.serving.requests import BadRequest, Message, ToolCall
from tests.loopback import TOOLS, loopback, scripted
from tests.test_api_agents import CHAT, RESPONSES, answered, engine_of, events_of, prompts_of

PATCH = '*** Begin Patch\n"é"\n*** End Patch\n'
LARK = 'start: "*** Begin Patch" /(.|\\n)*/'
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": LARK}
APPLY = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": GRAMMAR}
CHAT_APPLY = {
    "type": "custom",
    "custom": {
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": LARK}},
    },
}
SPAWN = {"type": "function", "name": "spawn", "description": "Spawns.", "parameters": {"type": "object"}}
NAMESPACE = {
    "type": "namespace",
    "name": "agents",
    "description": "Agents.",
    "tools": [SPAWN, {"type": "custom", "name": "agents.tell"}],
}
SEARCH = {"type": "web_search", "external_web_access": False}


def calls(*named: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(json.dumps({"name": name, "arguments": arguments}) for name, arguments in named)


SAID = calls(("apply_patch", {"input": PATCH}), ("agents.spawn", {"n": 1}), ("agents.tell", {"input": "go"}))


@pytest.fixture
def served() -> Iterator[tuple[Any, str]]:
    model = scripted(lambda *_: SAID, template=TOOLS)
    with loopback(model) as url:
        yield model, url


def test_a_custom_tool_is_called_with_text_in_responses(served: tuple[Any, str]) -> None:
    model, url = served
    answer = answered(url, RESPONSES, tools=[APPLY, NAMESPACE])
    custom, function, inner = answer["output"]
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert custom["id"].startswith("ctc_")
    assert "namespace" not in custom
    assert (function["type"], function["namespace"], function["name"]) == ("function_call", "agents", "spawn")
    assert json.loads(function["arguments"]) == {"n": 1}
    assert (inner["type"], inner["namespace"], inner["name"]) == ("custom_tool_call", "agents", "agents.tell")
    assert answer["tools"] == [APPLY, NAMESPACE]
    (prompt,) = prompts_of(model)
    for part in ("Edits files.", json.dumps(LARK)[1:-1], '"agents.spawn"', '"agents.tell"', '"input"'):
        assert part in prompt


def test_events_of_a_custom_tool(served: tuple[Any, str]) -> None:
    events = events_of(served[1], RESPONSES, tools=[APPLY, NAMESPACE])
    place = next(index for index, event in enumerate(events) if event["type"] == "response.output_item.added")
    added, delta, done, end = events[place : place + 4]
    assert (added["item"]["input"], added["item"]["status"]) == ("", "in_progress")
    assert (delta["type"], delta["delta"]) == ("response.custom_tool_call_input.delta", PATCH)
    assert (done["type"], done["input"]) == ("response.custom_tool_call_input.done", PATCH)
    assert end["item"] == {**added["item"], "input": PATCH, "status": "completed"}
    assert {delta["item_id"], done["item_id"]} == {end["item"]["id"]}
    assert [event["type"] for event in events[place + 4 : place + 8]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert events[place + 6]["name"] == events[place + 7]["item"]["name"]
    assert events[-1]["response"]["output"][0] == end["item"]


def test_a_custom_tool_in_chat_completions(served: tuple[Any, str]) -> None:
    model, url = served
    choice = answered(url, CHAT, tools=[CHAT_APPLY])["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "apply_patch", "input": PATCH})
    assert "function" not in call
    assert choice["finish_reason"] == "tool_calls"
    assert json.dumps(LARK)[1:-1] in prompts_of(model)[0]


def test_the_official_client_reads_custom_calls(served: tuple[Any, str]) -> None:
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="any", max_retries=0) as client:
        tools: Any = [APPLY]
        with client.responses.stream(model="wire", input="Patch it.", tools=tools) as stream:
            (call, *_) = stream.get_final_response().output
        assert call.type == "custom_tool_call"
        assert call.input == PATCH
        sent: Any = [CHAT_APPLY]
        asked: Any = [{"role": "user", "content": "Patch it."}]
        answer = client.chat.completions.create(model="wire", messages=asked, tools=sent)
        (made, *_) = answer.choices[0].message.tool_calls or []
        assert made.type == "custom"
        assert made.custom.input == PATCH
        chunks = list(client.chat.completions.create(model="wire", messages=asked, tools=sent, stream=True))
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [delta.model_dump()["custom"]["input"] for delta in deltas] == [PATCH]


def test_earlier_calls_of_custom_tools() -> None:
    result = [{"type": "input_text", "text": "done"}]
    told = [
        {"type": "custom_tool_call", "call_id": "1", "name": "tell", "namespace": "agents", "input": PATCH},
        {"type": "custom_tool_call_output", "call_id": "1", "output": result},
        {"type": "function_call", "call_id": "2", "name": "spawn", "namespace": "agents", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "ok"},
    ]
    first = ToolCall("1", 0, "agents.tell", {"input": PATCH})
    second = ToolCall("2", 0, "agents.spawn", {})
    assert ResponsesRequest.read({"model": "wire", "input": told}).chat_request().messages == (
        Message("assistant", tool_calls=(first,)),
        Message("tool", "done", tool_name="agents.tell", tool_call_id="1"),
        Message("assistant", tool_calls=(second,)),
        Message("tool", "ok", tool_name="agents.spawn", tool_call_id="2"),
    )
    made = {"id": "1", "type": "custom", "custom": {"name": "tell", "input": PATCH}}
    said = [{"role": "assistant", "content": None, "tool_calls": [made]}]
    (message,) = ChatCompletionRequest.read({"model": "wire", "messages": said}).chat_request().messages
    assert message.tool_calls == (ToolCall("1", 0, "tell", {"input": PATCH}),)


def test_a_forced_custom_tool_obeys_its_regular_expression() -> None:
    model = scripted(lambda *_: calls(("tell", {"input": "42"})), template=TOOLS)
    tool = {
        "type": "custom",
        "name": "tell",
        "format": {"type": "grammar", "syntax": "regex", "definition": "4|[0-9]+"},
    }
    nested = {"name": "tell", "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "4|[0-9]+"}}}
    with loopback(model) as url:
        answer = answered(url, RESPONSES, tools=[tool, APPLY], tool_choice={"type": "custom", "name": "tell"})
        choice = {"type": "custom", "custom": {"name": "tell"}}
        answered(url, CHAT, tools=[{"type": "custom", "custom": nested}, CHAT_APPLY], tool_choice=choice)
    assert answer["output"][0]["input"] == "42"
    for request in engine_of(model).requests:
        (call,) = request.constraint.calls.tools
        assert json.loads(call.schema)["properties"]["input"] == {"type": "string", "pattern": "^(?:4|[0-9]+)$"}


def test_other_arguments_than_the_input_stay_visible() -> None:
    wrong: list[dict[str, Any]] = [{"patch": "é"}, {"input": "a", "b": 1}, {"input": 5}]
    said = calls(*(("apply_patch", arguments) for arguments in wrong))
    with loopback(scripted(lambda *_: said, template=TOOLS)) as url:
        found = [item["input"] for item in answered(url, RESPONSES, tools=[APPLY])["output"]]
    assert [json.loads(text) for text in found] == wrong


def test_tools_that_do_not_run_here_are_left_out_beside_others_and_logged(
    served: tuple[Any, str], caplog: pytest.LogCaptureFixture
) -> None:
    model, url = served
    with caplog.at_level(logging.WARNING):
        answer = answered(url, RESPONSES, tools=[SEARCH, APPLY, {"type": "image_generation"}])
    assert "'web_search', 'image_generation'" in caplog.text
    assert answer["tools"] == [APPLY]
    assert "web_search" not in prompts_of(model)[0]
    caplog.clear()
    answered(url, RESPONSES, tools=[APPLY, NAMESPACE])
    assert not caplog.text


def responses(*tools: Any) -> Any:
    return ResponsesRequest.read({"model": "wire", "input": "a", "tools": list(tools)}).chat_request()


def chat(*tools: Any) -> Any:
    asked = [{"role": "user", "content": "a"}]
    return ChatCompletionRequest.read({"model": "wire", "messages": asked, "tools": list(tools)}).chat_request()


def messages(*tools: Any) -> Any:
    asked = [{"role": "user", "content": "a"}]
    return MessagesRequest.read(
        {"model": "wire", "messages": asked, "max_tokens": 1, "tools": list(tools)}
    ).chat_request()


WRONG: dict[str, Any] = {**APPLY, "format": {**GRAMMAR, "syntax": "bnf"}}


@pytest.mark.parametrize(
    ("read", "tools", "says"),
    [
        (responses, [SEARCH], '"web_search" are not supported'),
        (responses, [APPLY, {"type": "file_search", "vector_store_ids": ["a"]}], '"file_search"'),
        (responses, [APPLY, {"type": "mcp", "server_url": "a"}], '"mcp"'),
        (responses, [{**NAMESPACE, "tools": [SPAWN, NAMESPACE]}], '"namespace"'),
        (responses, [WRONG], "lark or regex"),
        (responses, [{**APPLY, "format": {"type": "grammar", "syntax": "lark"}}], "lark or regex"),
        (responses, [{**APPLY, "format": {"type": "json"}}], "lark or regex"),
        (chat, [{"type": "web_search"}], '"web_search"'),
        (chat, [{"type": "custom", "custom": {"name": "a", "format": {"type": "json"}}}], "lark or regex"),
        (messages, [{"type": "web_search_20250305", "name": "web_search"}], '"web_search_20250305"'),
        (messages, [{"name": "a"}, {"type": "bash_20250124", "name": "bash"}], '"bash_20250124"'),
    ],
)
def test_refused(read: Any, tools: list[Any], says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(*tools)
    assert says in caught.value.message

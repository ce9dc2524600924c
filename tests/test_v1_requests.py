"""Requests to the OpenAI and Anthropic APIs."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.http.v1.chat_requests import Completion, chat_request, text_request
from ollama_forge.serving.http.v1.embeddings import EmbeddingsRequest, embeddings, embeddings_request
from ollama_forge.serving.http.v1.message_requests import message_request
from ollama_forge.serving.http.v1.response_requests import ResponseRequest, response_request
from ollama_forge.serving.http.v1.turn import Turn
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

HI = [{"role": "user", "content": "hi"}]
IMAGE = b"\x89PNG not really"
DATA = base64.b64encode(IMAGE).decode()
WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}
NOTHING = {"type": "object", "properties": {}}
TIME = {"name": "get_time", "description": "", "parameters": NOTHING}
PARIS = {"city": "Paris"}


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def called(arguments: str) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]}


def chat(**body: Any) -> Completion:
    return chat_request(Fields({"model": "wire", "messages": HI, **body}, "ChatCompletionRequest"))


def text(**body: Any) -> Completion:
    return text_request(Fields({"model": "wire", "prompt": "hi", **body}, "CompletionRequest"))


def responses(input: Any = "hi", **body: Any) -> ResponseRequest:
    return response_request(Fields({"model": "wire", "input": input, **body}, "ResponsesRequest"))


def messages(**body: Any) -> Turn:
    return message_request(Fields({"model": "wire", "max_tokens": 5, "messages": HI, **body}, "MessagesRequest"))


def test_chat_says_nothing_of_sampling() -> None:
    turn = chat().turn
    assert (turn.sampling.temperature, turn.sampling.top_p, turn.sampling.seed) == (1.0, 1.0, None)
    assert (turn.num_predict, turn.stop, turn.tools, turn.think, turn.format, turn.logprobs, turn.stream) == (
        -1, (), (), None, None, None, False,
    )  # fmt: skip
    assert turn.messages == (Message("user", "hi"),)


def test_chat_options() -> None:
    turn = chat(
        temperature=0, top_p=0.5, seed=7, presence_penalty=1, frequency_penalty=-1, max_tokens=0, stop=["a", "b"],
        logprobs=True, top_logprobs=3, stream=True,
    ).turn  # fmt: skip
    assert (turn.sampling.temperature, turn.sampling.top_p, turn.sampling.seed) == (0, 0.5, 7)
    assert (turn.sampling.presence_penalty, turn.sampling.frequency_penalty) == (1, -1)
    assert (turn.num_predict, turn.stop, turn.logprobs, turn.stream) == (0, ("a", "b"), 3, True)


def test_chat_limits() -> None:
    assert chat(max_completion_tokens=4).turn.num_predict == 4
    assert chat(max_completion_tokens=4, max_tokens=8).turn.num_predict == 8
    assert chat(max_tokens=None).turn.num_predict == -1
    assert chat(max_tokens=8.0).turn.num_predict == 8


def test_stop_is_a_text_or_a_list() -> None:
    assert chat(stop="x").turn.stop == ("x",)
    assert chat(stop=["", "x"]).turn.stop == ("x",)
    assert chat(stop="").turn.stop == ()
    assert messages(stop_sequences=["x"]).stop == ("x",)


def test_alternatives_alone_ask_for_no_logprobs() -> None:
    assert chat(top_logprobs=3).turn.logprobs is None
    assert chat(logprobs=True).turn.logprobs == 0


def test_seed_of_minus_one_is_none() -> None:
    assert chat(seed=-1).turn.sampling.seed is None


@pytest.mark.parametrize(
    ("word", "think"),
    [("none", False), ("minimal", "low"), ("low", "low"), ("high", "high"), ("xhigh", "max"), ("", None)],
)
def test_effort(word: str, think: bool | str | None) -> None:
    assert chat(reasoning_effort=word).turn.think == think
    assert chat(reasoning={"effort": word}).turn.think == think
    assert responses(reasoning={"effort": word}).turn.think == think


def test_schemas_keep_their_order() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for format_ in (
        chat(response_format=wanted).turn.format,
        responses(text={"format": {"type": "json_schema", "name": "x", "schema": schema}}).turn.format,
    ):
        assert isinstance(format_, dict)
        assert list(format_["properties"]) == ["b", "a"]
    assert chat(response_format={"type": "json_object"}).turn.format == "json"
    assert chat(response_format={"type": "text"}).turn.format is None
    assert chat(response_format={"type": "json_schema"}).turn.format is None


def test_parts_are_one_message() -> None:
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
        {"type": "image_url", "image_url": f"data:;base64,{DATA}"},
        {"type": "text", "text": "is it"},
    ]
    (message,) = chat(messages=[{"role": "USER", "content": parts}]).turn.messages
    assert message == Message("user", "what\nis it", images=(IMAGE, IMAGE))


def test_chat_conversation_with_calls() -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    told = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [{"id": "call_1", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "11"},
    ]
    call = ToolCall("call_1", 0, "get_weather", {"city": "Paris"})
    assert chat(messages=told).turn.messages == (
        Message("system", "be brief"),
        Message("assistant", "", "hm", (call,)),
        Message("tool", "11", tool_name="get_weather", tool_call_id="call_1"),
    )


def test_tools_of_each_api_take_one_form() -> None:
    wanted = ({"type": "function", "function": WEATHER},)
    assert chat(tools=[{"type": "function", "function": {**WEATHER, "strict": True}}]).turn.tools == wanted
    assert responses(tools=[{"type": "function", **WEATHER, "strict": None}]).turn.tools == wanted
    schema = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER["parameters"]}
    assert messages(tools=[schema, {"type": "web_search_20250305", "name": "web_search"}]).tools == wanted
    assert chat(tools=[{"function": {"name": "get_time"}}]).turn.tools == ({"type": "function", "function": TIME},)


def test_choice_of_tools() -> None:
    tools = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
    assert chat(tools=tools, tool_choice="none").turn.tools == ()
    assert len(chat(tools=tools, tool_choice="auto").turn.tools) == 2
    named = {"type": "function", "function": {"name": "get_time"}}
    assert chat(tools=tools, tool_choice=named).turn.tools == ({"type": "function", "function": TIME},)
    assert messages(tools=[TIME, WEATHER], tool_choice={"type": "none"}).tools == ()
    assert len(messages(tools=[TIME, WEATHER], tool_choice={"type": "tool", "name": "get_time"}).tools) == 1
    assert len(messages(tools=[TIME, WEATHER], tool_choice={"type": "any"}).tools) == 2


def test_text_completion_is_one_turn() -> None:
    read = text(max_tokens=4, logprobs=2, suffix="end", stream=True, stream_options={"include_usage": True})
    assert (read.turn.messages, read.turn.num_predict, read.turn.logprobs) == ((Message("user", "hi"),), 4, 2)
    assert (read.suffix, read.usage, read.turn.stream) == ("end", True, True)
    assert text(prompt="").turn.messages == ()
    assert text(logprobs=0).turn.logprobs is None


def test_responses_conversation() -> None:
    told = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "hm"},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city":"Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": ""},
        {"type": "function_call_output", "call_id": "c2", "output": "noon"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Mild."}]},
    ]
    read = responses(told, instructions="be kind")
    assert read.turn.messages == (
        Message("system", "be kind"),
        Message("system", "be brief"),
        Message("user", "weather?"),
        Message("assistant", "", "hm", (ToolCall("c1", 0, "get_weather", PARIS), ToolCall("c2", 1, "get_time", {}))),
        Message("tool", "noon", tool_name="get_time", tool_call_id="c2"),
        Message("assistant", "Mild."),
    )  # fmt: skip
    assert read.echo["instructions"] == "be kind"
    assert responses("", instructions="").turn.messages == ()


def test_responses_repeat_what_was_asked() -> None:
    tools = [{"type": "function", **WEATHER, "strict": True}]
    read = responses(tools=tools, temperature=0.5, max_output_tokens=9, reasoning={"effort": "low"})
    assert (read.echo["temperature"], read.echo["top_p"], read.echo["max_output_tokens"]) == (0.5, 1.0, 9)
    assert (read.echo["tools"], read.echo["reasoning"]) == (tools, {"effort": "low", "summary": None})
    assert read.turn.num_predict == 9


def test_messages_conversation() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": PARIS}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "11"}]}
    told = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, image]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, call]},
        {"role": "user", "content": [{"type": "text", "text": "so?"}, result]},
    ]
    read = messages(messages=told, system=[{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}])
    assert read.messages == (
        Message("system", "be brief"),
        Message("user", "see", images=(IMAGE,)),
        Message("assistant", "", "hm", (ToolCall("t1", 0, "get_weather", {"city": "Paris"}),)),
        Message("tool", "11", tool_name="get_weather", tool_call_id="t1"),
        Message("user", "so?"),
    )
    assert (read.num_predict, read.sampling.temperature) == (5, 0.8)
    assert messages(top_k=3, temperature=0).sampling.top_k == 3


def test_messages_thinking() -> None:
    assert messages().think is None
    assert messages(thinking={"type": "enabled", "budget_tokens": 1024}).think is True
    assert messages(thinking={"type": "disabled"}).think is False
    assert messages(output_config={"effort": "XHIGH"}).think == "high"


REFUSED = [
    (chat, {"messages": []}, "[] is too short - 'messages'"),
    (chat, {"messages": "hi"}, "messages of type array"),
    (chat, {"messages": [5]}, "ChatCompletionRequest.messages of type object"),
    (chat, {"messages": [{"role": "user"}]}, "invalid message content type"),
    (chat, said({"type": "video"}), "invalid message format"),
    (chat, said("hi"), "invalid message format"),
    (chat, said(shown("http://x/y.png")), "not currently supported"),
    (chat, said(shown("data:image/png;base64,%")), "invalid image input"),
    (chat, called("[1]"), "invalid tool call arguments"),
    (chat, called("[" * 100000), "invalid tool call arguments"),
    (
        chat,
        {"temperature": "hot"},
        "cannot unmarshal string into Go struct field ChatCompletionRequest.temperature of type float64",
    ),
    (chat, {"temperature": True}, "of type float64"),
    (chat, {"temperature": float("inf")}, "of type float64"),
    (chat, {"temperature": 10**400}, "of type float64"),
    (chat, {"seed": 1 << 63}, "of type int"),
    (chat, {"max_tokens": 1.5}, "of type int"),
    (chat, {"max_tokens": float("inf")}, "of type int"),
    (chat, {"stream": "yes"}, "of type bool"),
    (chat, {"stop": 5}, "stop of type []string"),
    (chat, {"stop": [5]}, "stop of type string"),
    (chat, {"top_logprobs": 21}, "between 0 and 20"),
    (chat, {"reasoning_effort": "banana"}, "invalid reasoning value"),
    (chat, {"tools": [{"function": {"name": 5}}]}, "name of type string"),
    (chat, {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "invalid format"),
    (text, {"prompt": ["hi"]}, "cannot unmarshal array into Go struct field CompletionRequest.prompt of type string"),
    (text, {"logprobs": 21}, "between 0 and 20"),
    (responses, {"input": 5}, "input must be a string or array"),
    (responses, {"input": [{"type": "magic"}]}, 'unknown input item type: "magic"'),
    (responses, {"input": [{}]}, "missing required 'type'"),
    (responses, {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "not currently supported"),
    (responses, {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "unknown content type: x"),
    (responses, {"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
    (messages, {"model": ""}, "model is required"),
    (messages, {"max_tokens": None}, "max_tokens is required and must be positive"),
    (messages, {"messages": []}, "messages is required"),
    (messages, {"messages": [{"role": "user", "content": 5}]}, "content of type array"),
    (messages, said({"type": "image"}), "invalid image source"),
    (messages, said({"type": "image", "source": {"type": "url"}}), "Only base64"),
    (messages, said({"type": "tool_use", "id": "x"}), "missing required 'name'"),
]


@pytest.mark.parametrize(("read", "body", "says"), REFUSED)
def test_refused(read: Any, body: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**body)
    assert says in caught.value.message
    assert caught.value.status == 400


def test_embeddings() -> None:
    read = embeddings_request(Fields({"model": "wire", "input": "a"}, "EmbedRequest"))
    assert read == EmbeddingsRequest("wire", ("a",), None, encoded=False)
    body = {"input": ["a", ""], "dimensions": 8, "encoding_format": "BASE64"}
    assert embeddings_request(Fields(body, "EmbedRequest")) == EmbeddingsRequest("", ("a", ""), 8, encoded=True)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "invalid input"),
        ({"input": []}, "invalid input"),
        ({"input": [1, 2]}, "invalid input type"),
        ({"input": 5}, "invalid input type"),
        ({"input": "a", "encoding_format": "int8"}, "Supported values: ['float', 'base64']"),
    ],
)
def test_embeddings_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        embeddings_request(Fields(body, "EmbedRequest"))
    assert says in caught.value.message


def test_embeddings_are_written_as_numbers_or_as_little_endian_base64() -> None:
    vectors = [[0.5, -0.25], [0.0, 1.0]]
    plain = embeddings(EmbeddingsRequest("wire", ("a", "b"), None, encoded=False), vectors, 7)
    assert [one["embedding"] for one in plain["data"]] == vectors
    assert [one["index"] for one in plain["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = embeddings(EmbeddingsRequest("wire", ("a",), None, encoded=True), vectors[:1], 3)
    assert base64.b64decode(packed["data"][0]["embedding"]) == b"\x00\x00\x00\x3f\x00\x00\x80\xbe"

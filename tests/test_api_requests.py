"""Requests to the OpenAI and Anthropic APIs."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from ollama_forge.serving.api.anthropic.requests import MessagesRequest
from ollama_forge.serving.api.openai.requests import ChatCompletionRequest, CompletionRequest, EmbeddingsRequest
from ollama_forge.serving.api.openai.responses import embeddings_response
from ollama_forge.serving.api.openai.responses_requests import ResponsesRequest
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

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


def called(arguments: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]}


def chat(**body: Any) -> ChatRequest:
    return ChatCompletionRequest.read({"model": "wire", "messages": HI, **body}).chat_request()


def text(**body: Any) -> ChatRequest:
    return CompletionRequest.read({"model": "wire", "prompt": "hi", **body}).chat_request()


def responses(input: Any = "hi", **body: Any) -> ChatRequest:
    return ResponsesRequest.read({"model": "wire", "input": input, **body}).chat_request()


def echo(input: Any = "hi", **body: Any) -> dict[str, Any]:
    """The fields of a request that its response repeats."""
    read = ResponsesRequest.read({"model": "wire", "input": input, **body})
    return read.echo(read.chat_request())


def messages(**body: Any) -> ChatRequest:
    return MessagesRequest.read({"model": "wire", "max_tokens": 5, "messages": HI, **body}).chat_request()


def test_chat_says_nothing_of_sampling() -> None:
    turn = chat()
    assert (turn.sampling.temperature, turn.sampling.top_p, turn.sampling.seed) == (1.0, 1.0, None)
    assert (turn.num_predict, turn.stop, turn.tools, turn.think, turn.format, turn.logprobs, turn.stream) == (
        -1, (), (), None, None, None, False,
    )  # fmt: skip
    assert turn.messages == (Message("user", "hi"),)


def test_chat_options() -> None:
    turn = chat(
        temperature=0, top_p=0.5, seed=7, presence_penalty=1, frequency_penalty=-1, max_tokens=0, stop=["a", "b"],
        logprobs=True, top_logprobs=3, stream=True,
    )  # fmt: skip
    assert (turn.sampling.temperature, turn.sampling.top_p, turn.sampling.seed) == (0, 0.5, 7)
    assert (turn.sampling.presence_penalty, turn.sampling.frequency_penalty) == (1, -1)
    assert (turn.num_predict, turn.stop, turn.logprobs, turn.stream) == (0, ("a", "b"), 3, True)


def test_chat_limits() -> None:
    assert chat(max_completion_tokens=4).num_predict == 4
    assert chat(max_completion_tokens=4, max_tokens=8).num_predict == 8
    assert chat(max_tokens=None).num_predict == -1
    assert chat(max_tokens=8.0).num_predict == 8


def test_stop_is_a_text_or_a_list() -> None:
    assert chat(stop="x").stop == ("x",)
    assert chat(stop=["", "x"]).stop == ("x",)
    assert chat(stop="").stop == ()
    assert messages(stop_sequences=["x"]).stop == ("x",)


def test_alternatives_alone_ask_for_no_logprobs() -> None:
    assert chat(top_logprobs=3).logprobs is None
    assert chat(logprobs=True).logprobs == 0


def test_seed_of_minus_one_is_none() -> None:
    assert chat(seed=-1).sampling.seed is None


@pytest.mark.parametrize(
    ("word", "think"),
    [("none", False), ("minimal", "low"), ("low", "low"), ("high", "high"), ("xhigh", "max"), ("", None)],
)
def test_effort(word: str, think: bool | str | None) -> None:
    assert chat(reasoning_effort=word).think == think
    assert chat(reasoning={"effort": word}).think == think
    assert responses(reasoning={"effort": word}).think == think


def test_schemas_keep_their_order() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for format_ in (
        chat(response_format=wanted).format,
        responses(text={"format": {"type": "json_schema", "name": "x", "schema": schema}}).format,
    ):
        assert isinstance(format_, dict)
        assert list(format_["properties"]) == ["b", "a"]
    assert chat(response_format={"type": "json_object"}).format == "json"
    assert chat(response_format={"type": "text"}).format is None


def test_parts_are_one_message() -> None:
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
        {"type": "image_url", "image_url": f"data:;base64,{DATA}"},
        {"type": "text", "text": "is it"},
    ]
    (message,) = chat(messages=[{"role": "USER", "content": parts}]).messages
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
    assert chat(messages=told).messages == (
        Message("system", "be brief"),
        Message("assistant", "", "hm", (call,)),
        Message("tool", "11", tool_name="get_weather", tool_call_id="call_1"),
    )


def test_tools_of_each_api_take_one_form() -> None:
    wanted = ({"type": "function", "function": WEATHER},)
    assert chat(tools=[{"type": "function", "function": {**WEATHER, "strict": True}}]).tools == wanted
    assert responses(tools=[{"type": "function", **WEATHER, "strict": None}]).tools == wanted
    schema = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER["parameters"]}
    assert messages(tools=[schema, {"type": "web_search_20250305", "name": "web_search"}]).tools == wanted
    assert chat(tools=[{"function": {"name": "get_time"}}]).tools == ({"type": "function", "function": TIME},)


def test_choice_of_tools() -> None:
    tools = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
    assert chat(tools=tools, tool_choice="none").tools == ()
    assert len(chat(tools=tools, tool_choice="auto").tools) == 2
    named = {"type": "function", "function": {"name": "get_time"}}
    assert chat(tools=tools, tool_choice=named).tools == ({"type": "function", "function": TIME},)
    assert messages(tools=[TIME, WEATHER], tool_choice={"type": "none"}).tools == ()
    assert len(messages(tools=[TIME, WEATHER], tool_choice={"type": "tool", "name": "get_time"}).tools) == 1
    assert len(messages(tools=[TIME, WEATHER], tool_choice={"type": "any"}).tools) == 2


def test_text_completion_is_one_turn() -> None:
    body = {"prompt": "hi", "max_tokens": 4, "logprobs": 2, "suffix": "end", "stream": True}
    fields = CompletionRequest.read({**body, "stream_options": {"include_usage": True}})
    read = fields.chat_request()
    assert (read.messages, read.num_predict, read.logprobs) == ((Message("user", "hi"),), 4, 2)
    assert (fields.suffix, fields.include_usage, read.stream) == ("end", True, True)
    assert text(prompt="").messages == ()
    assert text(logprobs=0).logprobs is None


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
    assert read.messages == (
        Message("system", "be kind"),
        Message("system", "be brief"),
        Message("user", "weather?"),
        Message("assistant", "", "hm", (ToolCall("c1", 0, "get_weather", PARIS), ToolCall("c2", 1, "get_time", {}))),
        Message("tool", "noon", tool_name="get_time", tool_call_id="c2"),
        Message("assistant", "Mild."),
    )  # fmt: skip
    assert echo(told, instructions="be kind")["instructions"] == "be kind"
    assert responses("", instructions="").messages == ()


def test_responses_repeat_what_was_asked() -> None:
    tools = [{"type": "function", **WEATHER, "strict": True}]
    body = {"tools": tools, "temperature": 0.5, "max_output_tokens": 9, "reasoning": {"effort": "low"}}
    repeated = echo(**body)
    assert (repeated["temperature"], repeated["top_p"], repeated["max_output_tokens"]) == (0.5, 1.0, 9)
    assert (repeated["tools"], repeated["reasoning"]) == (tools, {"effort": "low", "summary": None})
    assert responses(**body).num_predict == 9


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


def test_thinking_by_the_switches_of_a_template() -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]}

    def think(**switches: Any) -> bool | str | None:
        read: bool | str | None = chat(**asked, reasoning_effort="high", chat_template_kwargs=switches).think
        return read

    assert (think(), think(enable_thinking=False), think(thinking=True)) == ("high", False, "high")
    assert think(enable_thinking=None, reasoning_effort="low") == "low"
    assert think(enable_thinking=False, reasoning_effort="low") is False  # as evaluate asks servers
    assert chat(**asked, chat_template_kwargs={"thinking": True}).think is True
    for wrong in (
        {"date": "x"},
        {"thinking": "x"},
        {"reasoning_effort": 5},
        {"thinking": True, "enable_thinking": False},
    ):
        with pytest.raises(BadRequest, match="chat_template_kwargs"):
            think(**wrong)


def test_thoughts_in_a_conversation_from_elsewhere_are_kept() -> None:
    (message,) = chat(messages=[{"role": "assistant", "content": "a", "reasoning_content": "hm"}]).messages
    assert message.thinking == "hm"
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    (message,) = responses([thought, {"role": "assistant", "content": "a"}]).messages
    assert (message.thinking, message.content) == ("hm", "a")


def test_sampling_fields_of_other_servers_are_honoured() -> None:
    read = chat(messages=[{"role": "user", "content": "hi"}], min_p=0.1, repetition_penalty=1.2)
    assert (read.sampling.min_p, read.sampling.repeat_penalty) == (0.1, 1.2)
    assert {"min_p", "repeat_penalty"} <= read.stated


def test_messages_thinking() -> None:
    assert messages().think is None
    assert messages(thinking={"type": "enabled", "budget_tokens": 1024}).think is True
    assert messages(thinking={"type": "disabled"}).think is False
    assert messages(output_config={"effort": "XHIGH"}).think == "high"


TEXT_FILE = {"filename": "a.md", "file_data": "data:text/markdown;base64," + base64.b64encode(b"# A").decode()}
PDF_FILE = {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + DATA}
FILE_TEXT = '<document title="a.md">\n# A\n</document>'


def test_text_files_are_read() -> None:
    (message,) = chat(**said({"type": "file", "file": TEXT_FILE}, {"type": "text", "text": "what?"})).messages
    assert message.content == f"{FILE_TEXT}\nwhat?"
    parts = [{"type": "input_file", **TEXT_FILE}, {"type": "input_text", "text": "what?"}]
    assert responses([{"role": "user", "content": parts}]).messages == (Message("user", FILE_TEXT + "what?"),)


def document(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, **more}


def test_text_documents_are_read() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "words"}
    blocks = {"type": "content", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    found = {"type": "search_result", "source": "http://x", "title": "X", "content": [{"type": "text", "text": "y"}]}
    (message,) = messages(**said(document(plain, title="T", context="c"), {"type": "text", "text": "what?"})).messages
    assert message.content == '<document title="T">\nc\nwords\n</document>what?'
    (message,) = messages(**said(document(blocks))).messages
    assert message.content == "<document>\na\nb\n</document>"
    result = {"type": "tool_result", "tool_use_id": "t", "content": [document(plain), found]}
    (message,) = messages(**said(result)).messages
    expected = '<document>\nwords\n</document><document title="X">\nhttp://x\ny\n</document>'
    assert (message.role, message.content) == ("tool", expected)


def test_refusals_of_earlier_turns_are_text() -> None:
    assert chat(**said({"type": "refusal", "refusal": "No."}, role="assistant")).messages[0].content == "No."
    told = [{"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]
    assert responses(told).messages == (Message("assistant", "No."),)


PICTURE = {"type": "image", "source": {"type": "base64", "data": DATA}}


def result(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t", "content": list(blocks)}


REFUSED = [
    (chat, said({"type": "file", "file": PDF_FILE}), "file inputs are not supported"),
    (chat, said({"type": "file", "file": {"file_id": "f"}}), "file inputs are not supported"),
    (chat, said({"type": "input_audio", "input_audio": {}}), "audio inputs are not supported"),
    (responses, {"input": [{"role": "user", "content": [{"type": "input_file", **PDF_FILE}]}]}, "file inputs"),
    (responses, {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "audio inputs"),
    (responses, {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "image_url"),
    (messages, said(document({"type": "base64", "media_type": "application/pdf", "data": DATA})), "application/pdf"),
    (messages, said(document({"type": "url", "url": "http://x"})), '"url"'),
    (messages, said(document(None)), "document source"),
    (messages, said(document({"type": "text", "data": "x"}, citations={"enabled": True})), "citations"),
    (messages, said({"type": "container_upload", "file_id": "f"}), "container_upload"),
    (messages, said(result({"type": "container_upload", "file_id": "f"})), "container_upload"),
    (
        messages,
        said(document({"type": "content", "content": [PICTURE]})),
        "image blocks are not supported in documents",
    ),
    (
        messages,
        said({"type": "search_result", "content": [PICTURE]}),
        "image blocks are not supported in search results",
    ),
    (messages, {**said(), "system": [PICTURE]}, "image blocks are not supported in system"),
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
    (responses, {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "file inputs are not supported"),
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


@pytest.mark.parametrize(
    ("read", "body", "path"),
    [
        (messages, said({"type": "text", "text": 5}), "MessagesRequest.messages.content.text of type string"),
        (messages, {"tools": [{"name": "f", "input_schema": []}]}, "MessagesRequest.tools.input_schema of type map"),
        (responses, {"input": [{"role": 5}]}, "ResponsesRequest.input.role of type string"),
        (responses, {"input": [5]}, "unmarshal number into Go struct field ResponsesRequest.input of type object"),
        (chat, called([]), "ChatCompletionRequest.messages.tool_calls.function.arguments of type string"),
    ],
)  # fmt: skip
def test_the_path_to_a_wrong_value_is_that_of_the_json(read: Any, body: dict[str, Any], path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**body)
    assert path in caught.value.message


def test_results_of_another_servers_tools_are_read_as_text() -> None:
    found = [
        {"type": "web_search_result", "title": "Rain", "url": "http://x/rain", "encrypted_content": "Zz"},
        {"type": "web_fetch_result", "url": "http://y", "content": document({"type": "text", "data": "It rains."})},
    ]
    blocks = [
        {"type": "server_tool_use", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "content": found},
    ]
    (message,) = messages(**said(*blocks)).messages
    assert (
        message.content
        == '<document title="web_search_tool_result">\nRain\nhttp://x/rain\nhttp://y\nIt rains.\n</document>'
    )


def test_files_in_results_of_another_servers_tools_and_deep_ones() -> None:
    pdf = {"type": "web_fetch_result", "url": "u", "content": document({"type": "base64", "data": DATA})}
    deep: Any = {"text": "in"}
    for _ in range(5000):
        deep = {"content": [deep]}
    for content, text in ((pdf, "u"), (deep, "in")):
        (message,) = messages(**said({"type": "web_fetch_tool_result", "content": content})).messages
        assert message.content.split("\n")[1:-1] == [text]


def test_all_thoughts_of_a_turn_are_kept() -> None:
    blocks = [
        {"type": "thinking", "thinking": "First."},
        {"type": "text", "text": "a"},
        {"type": "thinking", "thinking": "Then."},
    ]
    assert messages(**said(*blocks)).messages == (Message("user", "a", "First.\nThen."),)


def test_blocks_of_unknown_types_are_ignored_whatever_they_hold() -> None:
    blocks = [{"type": "server_tool_use", "input": 5, "text": 5}, {"text": 5}, {"type": "text", "text": "hi"}]
    assert messages(**said(*blocks)).messages == (Message("user", "hi"),)
    assert responses([{"type": "web_search_call", "content": 5}, *HI]).messages == (Message("user", "hi"),)


def test_names_match_in_any_case_and_null_is_absent() -> None:
    read = chat(Temperature=0.5, TOP_P=None, seed=None, SEED=3, stop=[None, "x"], tools=None)
    assert (read.sampling.temperature, read.sampling.top_p, read.sampling.seed) == (0.5, 1.0, None)
    assert (read.stop, read.tools) == (("x",), ())


def embed(**body: Any) -> EmbeddingsRequest:
    read = EmbeddingsRequest.read(body)
    read.check()
    return read


def test_embeddings() -> None:
    read = embed(model="wire", input="a")
    assert (read.model, read.input, read.dimensions, read.in_base64) == ("wire", ["a"], None, False)
    read = embed(input=["a", ""], dimensions=8, encoding_format="BASE64")
    assert (read.model, read.input, read.dimensions, read.in_base64) == ("", ["a", ""], 8, True)


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
        embed(**body)
    assert says in caught.value.message


def test_embeddings_are_written_as_numbers_or_as_little_endian_base64() -> None:
    vectors = [[0.5, -0.25], [0.0, 1.0]]
    plain = embeddings_response("wire", vectors, 7, in_base64=False).model_dump()
    assert [one["embedding"] for one in plain["data"]] == vectors
    assert [one["index"] for one in plain["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = embeddings_response("wire", vectors[:1], 3, in_base64=True).model_dump()
    assert base64.b64decode(packed["data"][0]["embedding"]) == b"\x00\x00\x00\x3f\x00\x00\x80\xbe"

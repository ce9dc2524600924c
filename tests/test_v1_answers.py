"""Responses of the OpenAI and Anthropic APIs."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.http.v1.answers import Sse, Writer, streamed
from ollama_forge.serving.http.v1.chat_answers import ChatChunks, TextChunks, chat_completion, text_completion
from ollama_forge.serving.http.v1.message_answers import MessageEvents, message
from ollama_forge.serving.http.v1.response_answers import ResponseEvents, response
from ollama_forge.serving.http.v1.response_requests import response_request
from ollama_forge.serving.requests import Completion, Delta, Done, Event, TokenLogprob, ToolCall

STOP = Done("stop", prompt_tokens=12, tokens=8, total_ns=1, load_ns=1, prompt_ns=1, answer_ns=1)
LENGTH = Done("length", prompt_tokens=12, tokens=8, total_ns=1, load_ns=1, prompt_ns=1, answer_ns=1)
CALL = ToolCall("call_12345678", 0, "get_weather", {"city": "Zürich"})
OTHER = ToolCall("call_87654321", 1, "get_time", {})
TOKEN = TokenLogprob(
    " é", (32, 195, 169), -0.5, (TokenLogprob(" é", (32, 195, 169), -0.5), TokenLogprob("x", (120,), -2.0))
)
ECHO = response_request(Fields({"input": "x"}, "x")).echo


def answer(*pieces: Delta, done: Done = STOP) -> Completion:
    async def collect() -> Completion:
        return await Completion.collect(events(*pieces, done))

    return asyncio.run(collect())


async def events(*given: Event, error: str | None = None) -> AsyncIterator[Event]:
    for event in given:
        yield event
    if error is not None:
        raise EngineError(error)


def written(writer: Writer, *given: Event) -> list[Any]:
    return [item.data for event in given for item in writer.write(event)]


def names(writer: Writer, *given: Event) -> list[str | None]:
    return [item.event for event in given for item in writer.write(event)]


def deltas(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]


def test_collecting_puts_the_pieces_together() -> None:
    found = answer(
        Delta(thinking="h"), Delta(thinking="m", content="a"), Delta("b", tool_calls=(CALL,), logprobs=(TOKEN,))
    )
    assert found == Completion("ab", "hm", (CALL,), (TOKEN,), STOP)


def test_an_answer_without_an_end_is_an_error() -> None:
    with pytest.raises(EngineError):
        asyncio.run(Completion.collect(events(Delta("a"))))


def test_chat_completion() -> None:
    body = chat_completion("wire", answer(Delta("Hello."), done=LENGTH))
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "length"}
    ]
    assert body["usage"] == {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
    assert (body["object"], body["model"]) == ("chat.completion", "wire")


def test_chat_completion_with_thought_calls_and_logprobs() -> None:
    (choice,) = chat_completion("wire", answer(Delta(thinking="hm"), Delta(tool_calls=(CALL,), logprobs=(TOKEN,))))[
        "choices"
    ]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning"] == "hm"
    (call,) = choice["message"]["tool_calls"]
    function = {"name": "get_weather", "arguments": '{"city":"Zürich"}'}
    assert call == {"id": CALL.id, "index": 0, "type": "function", "function": function}
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["bytes"], len(token["top_logprobs"])) == (" é", [32, 195, 169], 2)


def test_an_answer_cut_at_its_length_keeps_that_reason_beside_calls() -> None:
    (choice,) = chat_completion("wire", answer(Delta(tool_calls=(CALL,)), done=LENGTH))["choices"]
    assert choice["finish_reason"] == "length"


def test_logprobs_without_end_are_numbers() -> None:
    never = TokenLogprob("x", (120,), -math.inf)
    (choice,) = chat_completion("wire", answer(Delta("x", logprobs=(never,))))["choices"]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


def test_chat_chunks() -> None:
    chunks = written(ChatChunks("wire", usage=True), Delta("a"), Delta(), Delta("b", logprobs=(TOKEN,)), STOP)
    assert deltas(chunks) == [{"role": "assistant", "content": "a"}, {"content": "b"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:3]] == [None, None, "stop"]
    assert "logprobs" in chunks[1]["choices"][0]
    assert (chunks[3]["choices"], chunks[3]["usage"]["total_tokens"], chunks[4]) == ([], 20, "[DONE]")
    assert len({chunk["id"] for chunk in chunks[:4]}) == 1
    assert all("usage" not in chunk for chunk in written(ChatChunks("wire", usage=False), Delta("a"), STOP)[:2])


def test_chat_chunks_of_thought_and_calls() -> None:
    chunks = written(
        ChatChunks("wire", usage=False), Delta(thinking="h"), Delta("a", "m"), Delta(tool_calls=(CALL,)), STOP
    )
    found = deltas(chunks)
    assert found[:3] == [{"role": "assistant", "content": "", "reasoning": "h"}, {"reasoning": "m"}, {"content": "a"}]
    assert (found[3]["content"], found[3]["tool_calls"][0]["function"]["name"], found[4]) == ("", "get_weather", {})
    assert chunks[4]["choices"][0]["finish_reason"] == "tool_calls"


def test_chat_chunks_of_nothing_begin_with_the_role() -> None:
    assert deltas(written(ChatChunks("wire", usage=False), STOP)) == [{"role": "assistant", "content": ""}, {}]


def test_text_completion() -> None:
    body = text_completion("wire", answer(Delta(thinking="hm"), Delta(" é", logprobs=(TOKEN,))))
    (choice,) = body["choices"]
    assert (choice["text"], choice["index"], choice["finish_reason"]) == (" é", 0, "stop")
    assert choice["logprobs"] == {
        "tokens": [" é"], "token_logprobs": [-0.5], "top_logprobs": [{" é": -0.5, "x": -2.0}], "text_offset": [0],
    }  # fmt: skip


def test_text_chunks() -> None:
    chunks = written(
        TextChunks("wire", usage=True), Delta(thinking="hm"), *[Delta(" é", logprobs=(TOKEN,))] * 2, LENGTH
    )
    assert [c["choices"][0]["text"] for c in chunks[:3]] == [" é", " é", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:3]] == [None, None, "length"]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks[:2]] == [[0], [2]]
    assert (chunks[3]["choices"], chunks[3]["usage"]["prompt_tokens"], chunks[4]) == ([], 12, "[DONE]")


def test_message() -> None:
    body = message("wire", answer(Delta(thinking="hm"), Delta("a"), Delta(tool_calls=(CALL, OTHER))))
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": CALL.id, "name": "get_weather", "input": {"city": "Zürich"}},
        {"type": "tool_use", "id": OTHER.id, "name": "get_time", "input": {}},
    ]
    assert (body["stop_reason"], body["usage"]) == ("tool_use", {"input_tokens": 12, "output_tokens": 8})


def test_reasons_of_a_message() -> None:
    stopped = Done("stop", 1, 1, 1, 1, 1, 1, stopped_by="END")
    assert message("wire", answer(done=STOP))["stop_reason"] == "end_turn"
    assert message("wire", answer(done=LENGTH))["stop_reason"] == "max_tokens"
    body = message("wire", answer(done=stopped))
    assert (body["stop_reason"], body["stop_sequence"], body["content"]) == ("stop_sequence", "END", [])


def test_message_events_open_one_block_at_a_time() -> None:
    given = (Delta(thinking="h"), Delta("a", "m"), Delta("b"), Delta(tool_calls=(CALL, OTHER)), Delta("c"), STOP)
    found = written(MessageEvents("wire", prompt_tokens=3), *given)
    assert [event["type"] for event in found] == names(MessageEvents("wire", prompt_tokens=3), *given)
    assert found[0]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    blocks: dict[int, list[Any]] = {}
    for event in found[1:-2]:
        blocks.setdefault(event["index"], []).append(event)
    assert [events[0]["content_block"]["type"] for events in blocks.values()] == [
        "thinking", "text", "tool_use", "tool_use", "text",
    ]  # fmt: skip
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert all(events[-1]["type"] == "content_block_stop" for events in blocks.values())
    assert [event["delta"]["thinking"] for event in blocks[0][1:-1]] == ["h", "m"]
    assert [event["delta"]["text"] for event in blocks[1][1:-1]] == ["a", "b"]
    assert json.loads(blocks[2][1]["delta"]["partial_json"]) == {"city": "Zürich"}
    assert blocks[2][0]["content_block"]["input"] == {}
    assert (found[-2]["delta"], found[-1]["type"]) == ({"stop_reason": "tool_use"}, "message_stop")


def test_response() -> None:
    body = response("wire", ECHO, answer(Delta("a", "hm", (CALL,))))
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert body["output"][2]["arguments"] == '{"city":"Zürich"}'
    assert (body["status"], body["usage"]["total_tokens"]) == ("completed", 20)
    assert [i["type"] for i in response("wire", ECHO, answer(Delta(thinking="hm")))["output"]] == [
        "reasoning",
        "message",
    ]
    assert [i["type"] for i in response("wire", ECHO, answer(Delta(tool_calls=(CALL,))))["output"]] == ["function_call"]


def test_response_events_are_numbered_and_close_what_they_open() -> None:
    given = (Delta(thinking="h"), Delta("a", "m"), Delta("b"), Delta(tool_calls=(CALL, OTHER)), STOP)
    found = written(ResponseEvents("wire", ECHO), *given)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found] == names(ResponseEvents("wire", ECHO), *given)
    added = [event for event in found if event["type"] == "response.output_item.added"]
    done = [event for event in found if event["type"] == "response.output_item.done"]
    assert [event["item"]["type"] for event in added] == ["reasoning", "message", "function_call", "function_call"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert [event["item"]["id"] for event in added] == [event["item"]["id"] for event in done]
    last = found[-1]["response"]
    assert last["output"] == [event["item"] for event in done]
    assert last["output"][1]["content"][0]["text"] == "ab"
    assert last["output"][0]["summary"][0]["text"] == "hm"
    assert (last["status"], last["usage"]["output_tokens"]) == ("completed", 8)


WRITERS: list[Callable[[], Writer]] = [
    lambda: ChatChunks("w", usage=True),
    lambda: TextChunks("w", usage=True),
    lambda: MessageEvents("w", prompt_tokens=1),
    lambda: ResponseEvents("w", ECHO),
]


@pytest.mark.parametrize("make", WRITERS)
@pytest.mark.parametrize("before", [(), (Delta("a"),)])
def test_an_error_ends_the_stream(make: Callable[[], Writer], before: tuple[Delta, ...]) -> None:
    async def read() -> bytes:
        source = events(Delta("a"), *before, error="out of luck")
        return b"".join([piece async for piece in streamed(await anext(source), source, make())])

    last = asyncio.run(read()).decode().strip().split("\n\n")[-1]
    data = json.loads(last.split("data: ")[1])
    error = data["response"]["error"] if "response" in data else data["error"]
    assert error["message"] == "out of luck"
    assert "[DONE]" not in last


def test_server_sent_events_are_one_line_of_unescaped_json() -> None:
    def text() -> Iterator[bytes]:
        yield Sse({"a": "é\n"}, "x").encode()
        yield Sse("[DONE]").encode()

    assert b"".join(text()).decode() == 'event: x\ndata: {"a":"é\\n"}\n\ndata: [DONE]\n\n'

"""Responses of the OpenAI and Anthropic APIs."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from ollama_forge.serving.api.anthropic.responses import message as message_response
from ollama_forge.serving.api.anthropic.streaming import MessageWriter
from ollama_forge.serving.api.exchange import StreamWriter, server_sent_event, streamed
from ollama_forge.serving.api.openai import responses, responses_events
from ollama_forge.serving.api.openai.responses_events import ResponseWriter
from ollama_forge.serving.api.openai.responses_requests import ResponsesRequest
from ollama_forge.serving.api.openai.streaming import ChatWriter, TextWriter
from ollama_forge.serving.api.routing import ResponseModel
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.requests import Completion, Delta, Done, Event, TokenLogprob, ToolCall

STOP = Done("stop", prompt_tokens=12, tokens=8, total_ns=1, load_ns=1, prompt_ns=1, answer_ns=1)
LENGTH = Done("length", prompt_tokens=12, tokens=8, total_ns=1, load_ns=1, prompt_ns=1, answer_ns=1)
CALL = ToolCall("call_12345678", 0, "get_weather", {"city": "Zürich"})
OTHER = ToolCall("call_87654321", 1, "get_time", {})
TOKEN = TokenLogprob(
    " é", (32, 195, 169), -0.5, (TokenLogprob(" é", (32, 195, 169), -0.5), TokenLogprob("x", (120,), -2.0))
)
_REQUEST = ResponsesRequest.read({"input": "x"})
ECHO = _REQUEST.echo(_REQUEST.chat_request())


def answer(*pieces: Delta, done: Done = STOP) -> Completion:
    async def collect() -> Completion:
        (completion,) = await Completion.collect_choices(events(*pieces, done), 1)
        return completion

    return asyncio.run(collect())


async def events(*given: Event, error: str | None = None) -> AsyncIterator[Event]:
    for event in given:
        yield event
    if error is not None:
        raise EngineError(error)


def sent(body: BaseModel) -> Any:
    """A body as the client reads it."""
    return json.loads(body.model_dump_json())


def chat_completion(completion: Completion) -> Any:
    return sent(responses.chat_completion("wire", completion, tools={}))


def text_completion(completion: Completion) -> Any:
    return sent(responses.text_completion("wire", completion))


def message(completion: Completion) -> Any:
    return sent(message_response("wire", completion))


def response(completion: Completion) -> Any:
    return sent(responses_events.response("wire", ECHO, completion, tools={}))


def server_sent(writer: StreamWriter, *given: Event) -> list[tuple[str | None, Any]]:
    """Names and data of the events that a client reads."""
    out = []
    for data in b"".join(piece for event in given for piece in writer.write(event)).decode().split("\n\n")[:-1]:
        name, _, text = data.rpartition("data: ")
        out.append((name.removeprefix("event: ").strip() or None, text if text == "[DONE]" else json.loads(text)))
    return out


def written(writer: StreamWriter, *given: Event) -> list[Any]:
    return [data for _, data in server_sent(writer, *given)]


def names(writer: StreamWriter, *given: Event) -> list[str | None]:
    return [name for name, _ in server_sent(writer, *given)]


def deltas(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]


def test_collecting_puts_the_pieces_together() -> None:
    found = answer(
        Delta(thinking="h"), Delta(thinking="m", content="a"), Delta("b", tool_calls=(CALL,), logprobs=(TOKEN,))
    )
    assert found == Completion("ab", "hm", (CALL,), (TOKEN,), STOP)


def test_an_answer_without_an_end_is_an_error() -> None:
    with pytest.raises(EngineError):
        asyncio.run(Completion.collect_choices(events(Delta("a")), 1))


def test_chat_completion() -> None:
    body = chat_completion(answer(Delta("Hello."), done=LENGTH))
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "length"}
    ]
    assert body["usage"] == {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
    assert (body["object"], body["model"]) == ("chat.completion", "wire")


def test_chat_completion_with_thought_calls_and_logprobs() -> None:
    (choice,) = chat_completion(answer(Delta(thinking="hm"), Delta(tool_calls=(CALL,), logprobs=(TOKEN,))))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning"] == "hm"
    (call,) = choice["message"]["tool_calls"]
    function = {"name": "get_weather", "arguments": '{"city":"Zürich"}'}
    assert call == {"id": CALL.id, "index": 0, "type": "function", "function": function}
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["bytes"], len(token["top_logprobs"])) == (" é", [32, 195, 169], 2)


def test_an_answer_cut_at_its_length_keeps_that_reason_beside_calls() -> None:
    (choice,) = chat_completion(answer(Delta(tool_calls=(CALL,)), done=LENGTH))["choices"]
    assert choice["finish_reason"] == "length"


def test_logprobs_without_end_are_numbers() -> None:
    never = TokenLogprob("x", (120,), -math.inf)
    (choice,) = chat_completion(answer(Delta("x", logprobs=(never,))))["choices"]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


def test_chat_chunks() -> None:
    chunks = written(
        ChatWriter("wire", include_usage=True, tools={}), Delta("a"), Delta(), Delta("b", logprobs=(TOKEN,)), STOP
    )
    assert deltas(chunks) == [{"role": "assistant", "content": "a"}, {"content": "b"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:3]] == [None, None, "stop"]
    assert "logprobs" in chunks[1]["choices"][0]
    assert (chunks[3]["choices"], chunks[3]["usage"]["total_tokens"], chunks[4]) == ([], 20, "[DONE]")
    assert len({chunk["id"] for chunk in chunks[:4]}) == 1
    assert all(
        "usage" not in chunk
        for chunk in written(ChatWriter("wire", include_usage=False, tools={}), Delta("a"), STOP)[:2]
    )


def test_chat_chunks_of_thought_and_calls() -> None:
    chunks = written(
        ChatWriter("wire", include_usage=False, tools={}),
        Delta(thinking="h"),
        Delta("a", "m"),
        Delta(tool_calls=(CALL,)),
        STOP,
    )
    found = deltas(chunks)
    assert found[:3] == [{"role": "assistant", "content": "", "reasoning": "h"}, {"reasoning": "m"}, {"content": "a"}]
    assert (found[3]["content"], found[3]["tool_calls"][0]["function"]["name"], found[4]) == ("", "get_weather", {})
    assert chunks[4]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_usage_of_several_answers_has_the_cached_tokens_of_the_first() -> None:
    ends = [replace(STOP, choice=1, cached_tokens=9), replace(STOP, choice=0, cached_tokens=3)]
    chunks = written(ChatWriter("wire", include_usage=True, tools={}, choices=2), *ends)
    counts = chunks[-2]["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == (12, 16, 28)
    assert counts["prompt_tokens_details"] == {"cached_tokens": 3}


def test_chat_chunks_of_nothing_begin_with_the_role() -> None:
    assert deltas(written(ChatWriter("wire", include_usage=False, tools={}), STOP)) == [
        {"role": "assistant", "content": ""},
        {},
    ]


def test_text_completion() -> None:
    body = text_completion(answer(Delta(thinking="hm"), Delta(" é", logprobs=(TOKEN,))))
    (choice,) = body["choices"]
    assert (choice["text"], choice["index"], choice["finish_reason"]) == (" é", 0, "stop")
    assert choice["logprobs"] == {
        "tokens": [" é"], "token_logprobs": [-0.5], "top_logprobs": [{" é": -0.5, "x": -2.0}], "text_offset": [0],
    }  # fmt: skip


def test_text_chunks() -> None:
    chunks = written(
        TextWriter("wire", include_usage=True), Delta(thinking="hm"), *[Delta(" é", logprobs=(TOKEN,))] * 2, LENGTH
    )
    assert [c["choices"][0]["text"] for c in chunks[:3]] == [" é", " é", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:3]] == [None, None, "length"]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks[:2]] == [[0], [2]]
    assert (chunks[3]["choices"], chunks[3]["usage"]["prompt_tokens"], chunks[4]) == ([], 12, "[DONE]")


def test_message() -> None:
    body = message(answer(Delta(thinking="hm"), Delta("a"), Delta(tool_calls=(CALL, OTHER))))
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": CALL.id, "name": "get_weather", "input": {"city": "Zürich"}},
        {"type": "tool_use", "id": OTHER.id, "name": "get_time", "input": {}},
    ]
    assert (body["stop_reason"], body["usage"]) == ("tool_use", {"input_tokens": 12, "output_tokens": 8})


def test_reasons_of_a_message() -> None:
    stopped = Done("stop", 1, 1, 1, 1, 1, 1, stopped_by="END")
    assert message(answer(done=STOP))["stop_reason"] == "end_turn"
    assert message(answer(done=LENGTH))["stop_reason"] == "max_tokens"
    body = message(answer(done=stopped))
    assert (body["stop_reason"], body["stop_sequence"], body["content"]) == ("stop_sequence", "END", [])


def test_message_events_open_one_block_at_a_time() -> None:
    given = (Delta(thinking="h"), Delta("a", "m"), Delta("b"), Delta(tool_calls=(CALL, OTHER)), Delta("c"), STOP)
    found = written(MessageWriter("wire", prompt_tokens=3), *given)
    assert [event["type"] for event in found] == names(MessageWriter("wire", prompt_tokens=3), *given)
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
    body = response(answer(Delta("a", "hm", (CALL,))))
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert body["output"][2]["arguments"] == '{"city":"Zürich"}'
    assert (body["status"], body["usage"]["total_tokens"]) == ("completed", 20)
    assert [i["type"] for i in response(answer(Delta(thinking="hm")))["output"]] == [
        "reasoning",
        "message",
    ]
    assert [i["type"] for i in response(answer(Delta(tool_calls=(CALL,))))["output"]] == ["function_call"]


def test_response_events_are_numbered_and_close_what_they_open() -> None:
    given = (Delta(thinking="h"), Delta("a", "m"), Delta("b"), Delta(tool_calls=(CALL, OTHER)), STOP)
    found = written(ResponseWriter("wire", ECHO, tools={}), *given)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found] == names(ResponseWriter("wire", ECHO, tools={}), *given)
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


WRITERS: list[Callable[[], StreamWriter]] = [
    lambda: ChatWriter("w", include_usage=True, tools={}),
    lambda: TextWriter("w", include_usage=True),
    lambda: MessageWriter("w", prompt_tokens=1),
    lambda: ResponseWriter("w", ECHO, tools={}),
]


@pytest.mark.parametrize("make", WRITERS)
@pytest.mark.parametrize("before", [(), (Delta("a"),)])
def test_an_error_ends_the_stream(make: Callable[[], StreamWriter], before: tuple[Delta, ...]) -> None:
    async def read() -> bytes:
        source = events(Delta("a"), *before, error="out of luck")
        return b"".join([piece async for piece in streamed(await anext(source), source, make())])

    last = asyncio.run(read()).decode().strip().split("\n\n")[-1]
    data = json.loads(last.split("data: ")[1])
    error = data["response"]["error"] if "response" in data else data["error"]
    assert error["message"] == "out of luck"
    assert "[DONE]" not in last


class Said(ResponseModel):
    a: str


def test_server_sent_events_are_one_line_of_unescaped_json() -> None:
    text = server_sent_event(Said(a="é\n"), "x") + server_sent_event("[DONE]")
    assert text.decode() == 'event: x\ndata: {"a":"é\\n"}\n\ndata: [DONE]\n\n'

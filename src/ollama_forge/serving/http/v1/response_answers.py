"""Responses of OpenAI's Responses API, streamed and not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ollama_forge.serving.http.v1.answers import Sse, compact, new_id
from ollama_forge.serving.requests import Completion, Delta, Done, Event, ToolCall


def response(model: str, echo: Mapping[str, Any], answer: Completion) -> dict[str, Any]:
    """The body of a response to ``/v1/responses``; ``echo`` has the fields of the request that it repeats."""
    output: list[dict[str, Any]] = []
    if answer.thinking:
        output.append(_reasoning(new_id("rs_"), answer.thinking))
    if answer.content or not answer.tool_calls:
        output.append(_message(new_id("msg_"), answer.content))
    output += [_function_call(new_id("fc_"), call) for call in answer.tool_calls]
    now = int(time.time())
    return _response(new_id("resp_"), model, echo, created=now, output=output, done=answer.done)


class ResponseEvents:
    """The numbered events of a streamed response: output items of thinking, text and tool calls, one after another."""

    def __init__(self, model: str, echo: Mapping[str, Any]) -> None:
        self._id, self._model, self._echo = new_id("resp_"), model, echo
        self._created = int(time.time())
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None
        self._item_id = self._text = ""

    def write(self, event: Event) -> Iterator[Sse]:
        if self._number == 0:
            yield from self._begin()
        if isinstance(event, Delta):
            if event.thinking:
                yield from self._thinking(event.thinking)
            if event.content:
                yield from self._content(event.content)
            for call in event.tool_calls:
                yield from self._call(call)
            return
        yield from self._close()
        yield self._event("response.completed", response=self._response(done=event))

    def failed(self, message: str) -> Iterator[Sse]:
        if self._number == 0:
            yield from self._begin()
        error = {"code": "server_error", "message": message}
        yield self._event("response.failed", response=self._response(status="failed", error=error))

    def _begin(self) -> Iterator[Sse]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(status="in_progress"))

    def _thinking(self, text: str) -> Iterator[Sse]:
        if self._open != "reasoning":
            yield from self._close()
            self._start("reasoning", "rs_")
            item = {"id": self._item_id, "type": "reasoning", "summary": []}
            yield self._event("response.output_item.added", **self._place(), item=item)
        self._text += text
        yield self._event("response.reasoning_summary_text.delta", **self._of_item(), summary_index=0, delta=text)

    def _content(self, text: str) -> Iterator[Sse]:
        if self._open != "message":
            yield from self._close()
            self._start("message", "msg_")
            item = {**_message(self._item_id, ""), "status": "in_progress", "content": []}
            yield self._event("response.output_item.added", **self._place(), item=item)
            yield self._event("response.content_part.added", **self._of_item(), content_index=0, part=_output_text(""))
        self._text += text
        yield self._event("response.output_text.delta", **self._of_item(), content_index=0, delta=text, logprobs=[])

    def _call(self, call: ToolCall) -> Iterator[Sse]:
        yield from self._close()
        self._start("function_call", "fc_")
        item = _function_call(self._item_id, call)
        begun = {**item, "status": "in_progress", "arguments": ""}
        arguments = item["arguments"]
        yield self._event("response.output_item.added", **self._place(), item=begun)
        yield self._event("response.function_call_arguments.delta", **self._of_item(), delta=arguments)
        yield self._event("response.function_call_arguments.done", **self._of_item(), arguments=arguments)
        yield from self._end(item)

    def _start(self, kind: str, prefix: str) -> None:
        self._open, self._item_id, self._text = kind, new_id(prefix), ""

    def _close(self) -> Iterator[Sse]:
        place, text = self._of_item(), self._text
        if self._open == "reasoning":
            yield self._event("response.reasoning_summary_text.done", **place, summary_index=0, text=text)
            yield from self._end(_reasoning(self._item_id, text))
        elif self._open == "message":
            yield self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, content_index=0, part=_output_text(text))
            yield from self._end(_message(self._item_id, text))

    def _end(self, item: dict[str, Any]) -> Iterator[Sse]:
        yield self._event("response.output_item.done", **self._place(), item=item)
        self._output.append(item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output)}

    def _of_item(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": len(self._output)}

    def _response(self, status: str = "completed", **more: Any) -> dict[str, Any]:
        output = list(self._output)
        return _response(self._id, self._model, self._echo, created=self._created, output=output, status=status, **more)

    def _event(self, kind: str, **fields: Any) -> Sse:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return Sse(data, kind)


def _response(
    id_: str,
    model: str,
    echo: Mapping[str, Any],
    *,
    created: int,
    output: list[dict[str, Any]],
    status: str = "completed",
    done: Done | None = None,
    error: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "response",
        "created_at": created,
        "completed_at": None if done is None else int(time.time()),
        "status": status,
        "incomplete_details": None,
        "model": model,
        "previous_response_id": None,
        "output": output,
        "error": error,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "usage": None if done is None else _usage(done),
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
        **echo,
    }


def _reasoning(id_: str, text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}]
    return {"id": id_, "type": "reasoning", "summary": summary, "encrypted_content": text}


def _message(id_: str, text: str) -> dict[str, Any]:
    return {"id": id_, "type": "message", "status": "completed", "role": "assistant", "content": [_output_text(text)]}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(id_: str, call: ToolCall) -> dict[str, Any]:
    head = {"id": id_, "type": "function_call", "status": "completed", "call_id": call.id}
    return {**head, "name": call.name, "arguments": compact(call.arguments)}


def _usage(done: Done) -> dict[str, Any]:
    return {
        "input_tokens": done.prompt_tokens,
        "output_tokens": done.tokens,
        "total_tokens": done.prompt_tokens + done.tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }

"""Responses of OpenAI's chat completions and text completions, streamed and not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ollama_forge.serving.http.v1.answers import Sse, compact, new_id
from ollama_forge.serving.http.v1.errors import openai_error
from ollama_forge.serving.requests import Completion, Delta, Done, Event, TokenLogprob, ToolCall

FINGERPRINT = "fp_ollama"
UNLIKELY = -9999.0  # OpenAI's value for unlikely tokens; JSON has no infinity


def chat_completion(model: str, answer: Completion) -> dict[str, Any]:
    """The body of a response to ``/v1/chat/completions``."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.thinking:
        message["reasoning"] = answer.thinking
    if answer.tool_calls:
        message["tool_calls"] = _calls(answer.tool_calls)
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": _reason(answer.done, called=bool(answer.tool_calls)),
    }
    if answer.logprobs:
        choice["logprobs"] = {"content": [_logprob(token) for token in answer.logprobs]}
    head = {"id": new_id("chatcmpl-"), "object": "chat.completion", "created": int(time.time()), "model": model}
    return {**head, "system_fingerprint": FINGERPRINT, "choices": [choice], "usage": _usage(answer.done)}


class ChatChunks:
    """The chunks of a streamed chat completion. The first has the role; one without content has the finish reason."""

    def __init__(self, model: str, *, usage: bool) -> None:
        self._head = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": int(time.time())}
        self._head |= {"model": model, "system_fingerprint": FINGERPRINT}
        self._usage = usage
        self._begun = self._called = False

    def write(self, event: Event) -> Iterator[Sse]:
        if isinstance(event, Delta):
            yield from self._piece(event)
            return
        if not self._begun:
            yield self._chunk({"content": ""})
        yield self._chunk({}, reason=_reason(event, called=self._called))
        if self._usage:
            yield Sse({**self._head, "choices": [], "usage": _usage(event)})
        yield Sse("[DONE]")

    def failed(self, message: str) -> Iterator[Sse]:
        yield Sse(openai_error(500, message))

    def _piece(self, piece: Delta) -> Iterator[Sse]:
        if piece.empty:
            return
        self._called = self._called or bool(piece.tool_calls)
        calls = {"tool_calls": _calls(piece.tool_calls)} if piece.tool_calls else {}
        if piece.thinking and (piece.content or piece.tool_calls):
            yield self._chunk({"reasoning": piece.thinking}, logprobs=piece.logprobs)
            yield self._chunk({"content": piece.content, **calls})
            return
        thought = {"reasoning": piece.thinking} if piece.thinking else {}
        yield self._chunk({"content": piece.content, **thought, **calls}, logprobs=piece.logprobs)

    def _chunk(self, delta: dict[str, Any], *, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()) -> Sse:
        if not self._begun:
            delta = {"role": "assistant", **delta}
            self._begun = True
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": [_logprob(token) for token in logprobs]}
        return Sse({**self._head, "choices": [choice]})


def text_completion(model: str, answer: Completion) -> dict[str, Any]:
    """The body of a response to ``/v1/completions``; its text does not include thinking."""
    choice: dict[str, Any] = {"text": answer.content, "index": 0, "finish_reason": answer.done.reason}
    if answer.logprobs:
        choice["logprobs"] = _text_logprobs(answer.logprobs, 0)
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "system_fingerprint": FINGERPRINT, "choices": [choice], "usage": _usage(answer.done)}


class TextChunks:
    """The chunks of a streamed text completion. One without text has the finish reason."""

    def __init__(self, model: str, *, usage: bool) -> None:
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time())}
        self._tail = {"model": model, "system_fingerprint": FINGERPRINT}
        self._usage = usage
        self._offset = 0

    def write(self, event: Event) -> Iterator[Sse]:
        if isinstance(event, Delta):
            if event.content or event.logprobs:
                yield self._chunk(event.content, None, event.logprobs)
            return
        yield self._chunk("", event.reason)
        if self._usage:
            yield Sse({**self._head, "choices": [], **self._tail, "usage": _usage(event)})
        yield Sse("[DONE]")

    def failed(self, message: str) -> Iterator[Sse]:
        yield Sse(openai_error(500, message))

    def _chunk(self, text: str, reason: str | None, logprobs: Sequence[TokenLogprob] = ()) -> Sse:
        choice: dict[str, Any] = {"text": text, "index": 0, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = _text_logprobs(logprobs, self._offset)
            self._offset += sum(len(token.text) for token in logprobs)
        return Sse({**self._head, "choices": [choice], **self._tail})


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A tool call in OpenAI's format: the arguments are a string of JSON."""
    function = {"name": call.name, "arguments": compact(call.arguments)}
    return {"id": call.id, "index": call.index, "type": "function", "function": function}


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [tool_call(call) for call in calls]


def _reason(done: Done, *, called: bool) -> str:
    return "tool_calls" if called and done.reason == "stop" else done.reason


def _usage(done: Done) -> dict[str, int]:
    prompt, answer = done.prompt_tokens, done.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_alternative(token), "top_logprobs": [_alternative(other) for other in token.top]}


def _alternative(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, UNLIKELY), "bytes": list(token.bytes)}


def _text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Log-probabilities in the format of text completions; ``offset`` is the first token's place in the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, UNLIKELY) for token in tokens],
        "top_logprobs": [{other.text: max(other.logprob, UNLIKELY) for other in token.top} for token in tokens],
        "text_offset": offsets,
    }

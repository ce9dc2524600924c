"""The JSON objects of Ollama's responses; a streamed response has one object per line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.requests import Delta, Done, Event, TokenLogprob, ToolCall

NDJSON = "application/x-ndjson"
UNLIKELY = -9999.0  # the least log-probability in a response, because JSON has no infinity
Line = dict[str, Any]
WriteLine = Callable[[Event], Line]


def line(value: Mapping[str, Any]) -> bytes:
    """A line of a streamed response."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def now() -> str:
    """The current time with nanoseconds, as Go prints it."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def timestamp(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"


def generated(
    model: str,
    content: str = "",
    thinking: str = "",
    *,
    logprobs: Sequence[TokenLogprob] = (),
    done: Done | None = None,
    context: bool = True,
) -> Line:
    """An object of ``/api/generate``; with ``context``, the last one has the token ids of prompt and answer."""
    out: Line = {"model": model, "created_at": now(), "response": content}
    if thinking:
        out["thinking"] = thinking
    out |= _ending(done)
    if done is not None and context and done.context:
        out["context"] = list(done.context)
    return out | _counts(done) | _logprobs(logprobs)


def chatted(
    model: str,
    content: str = "",
    thinking: str = "",
    *,
    calls: Sequence[ToolCall] = (),
    logprobs: Sequence[TokenLogprob] = (),
    done: Done | None = None,
) -> Line:
    """An object of ``/api/chat``."""
    message: Line = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": dict(call.arguments)}}
            for call in calls
        ]
    out = {"model": model, "created_at": now(), "message": message, **_ending(done)}
    return out | _logprobs(logprobs) | _counts(done)


async def written(
    first: Event, rest: AsyncIterator[Event], write: WriteLine, *, silent: bool = False
) -> AsyncGenerator[bytes]:
    """The body of a streamed response; if generation fails, its last line is an error.

    Args:
        silent: write a line also for a token whose text is held back.
    """
    try:
        if silent or not _is_silent(first):
            yield line(write(first))
        async for event in rest:
            if silent or not _is_silent(event):
                yield line(write(event))
    except EngineError as error:
        yield line({"error": str(error)})


def _is_silent(event: Event) -> bool:
    return isinstance(event, Delta) and event.empty


def _ending(done: Done | None) -> Line:
    return {"done": False} if done is None else {"done": True, "done_reason": done.reason}


def _counts(done: Done | None) -> Line:
    if done is None or done.reason in ("load", "unload"):
        return {}
    counts = {
        "total_duration": done.total_ns,
        "load_duration": done.load_ns,
        "prompt_eval_count": done.prompt_tokens,
        "prompt_eval_duration": done.prompt_ns,
        "eval_count": done.tokens,
        "eval_duration": done.answer_ns,
    }
    return {name: count for name, count in counts.items() if count}  # Ollama leaves out counts that are 0


def _logprobs(logprobs: Sequence[TokenLogprob]) -> Line:
    return {"logprobs": [_token(token) for token in logprobs]} if logprobs else {}


def _token(token: TokenLogprob) -> Line:
    out: Line = {"token": token.text, "logprob": max(token.logprob, UNLIKELY), "bytes": list(token.bytes)}
    if token.top:
        out["top_logprobs"] = [_token(other) for other in token.top]
    return out

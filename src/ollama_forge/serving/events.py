"""The events of an answer, between the engine and the APIs: pieces of text, calls of tools, and the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. ``id`` is ``call_`` and eight characters; ``index`` counts the calls of an answer from 0."""

    id: str
    index: int
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's exact text with leading spaces, its bytes, its natural log-probability, and its likeliest rivals."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer: text of the answer or of the thought in whole characters, or calls of tools."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: ``stop`` if the model or a stop string ended it, ``length`` if it was cut.
        tokens: how many tokens were generated, with the one that ended the answer.
        total_ns, load_ns, prompt_ns, answer_ns: nanoseconds in all, in the queue, on the prompt, on the answer.
        stopped_by: the stop string that ended it, if one did.
        context: ids of prompt and answer, for Ollama's ``context``.
    """

    reason: str
    prompt_tokens: int
    tokens: int
    total_ns: int
    load_ns: int
    prompt_ns: int
    answer_ns: int
    stopped_by: str | None = None
    context: tuple[int, ...] = ()


Event = Delta | Done

"""What an answer is made of, above the engine and below every API: pieces of text, calls of tools, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes. ``id`` is ``call_`` and eight characters; ``index`` counts from 0 in an answer."""

    id: str
    index: int
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TokenLogprob:
    """One token's exact text (leading spaces and all), bytes and natural log-probability."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece: of the answer, of the thought before it, or calls; never half a character."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end. Times are nanoseconds.

    Attributes:
        reason: ``stop`` or ``length``.
        tokens: that were generated, the one that ended the answer among them.
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

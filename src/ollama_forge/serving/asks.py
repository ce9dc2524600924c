"""What an API asks of a served model: messages that become a prompt, and the ask that an answer is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from ollama_forge.serving.engines.base import Sampling
from ollama_forge.serving.events import ToolCall
from ollama_forge.text.thinking import ThinkingSplit

BUSY = "server busy, please try again.  maximum pending requests exceeded"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` in lower case.

    Attributes:
        tool_name, tool_call_id: which call a message of role ``tool`` answers; either may be missing.
        images: the files' bytes.
    """

    role: str
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt, rendered, truncated and encoded.

    Attributes:
        context: tokens there is room for, prompt and answer together.
        media: what the engine made of images.
        thinking: how the thought is told from the answer; None: it isn't.
        tools: names of the tools that were sent; calls of these are parsed, with none nothing is.
    """

    ids: tuple[int, ...]
    context: int
    media: object | None = None
    thinking: ThinkingSplit | None = None
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        num_predict: at most so many tokens; below 0 until the model ends or the context is full, 0 gives none.
        stop: exact texts that end the answer before them.
        schema: a JSON schema, as text, that the answer satisfies.
        logprobs: None for none, else with how many alternatives each token's log-probability comes.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    schema: str | None = None
    logprobs: int | None = None


class BadRequest(Exception):  # noqa: N818
    """An ask that cannot be answered as it is; ``message`` is fit for a client's eyes, ``status`` an HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Busy(Exception):  # noqa: N818
    """As many asks are waiting as may."""

"""What an API gives a served model: messages, the prompt made of them, and the request for one answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.events import ToolCall
from ollama_forge.text.thinking import ThinkingSplit

BUSY = "server busy, please try again.  maximum pending requests exceeded"


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: in lower case.
        tool_name, tool_call_id: the call that a message of role ``tool`` answers; either may be "".
        images: the bytes of image files.
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
        ids: the prompt's token ids.
        context: the most tokens that prompt and answer may have together.
        media: the engine's encoding of the images.
        thinking: how the thought is told from the answer; None: there is no thought.
        tools: names of the tools that were sent; calls of other tools stay text.
    """

    ids: tuple[int, ...]
    context: int
    media: object | None = None
    thinking: ThinkingSplit | None = None
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A request for one answer.

    Attributes:
        num_predict: the most tokens of the answer; below 0: until the model ends it or the context is full.
        stop: texts that end the answer; it does not include them.
        schema: the text of a JSON schema that the answer satisfies.
        logprobs: how many alternatives to give with each token's log-probability; None: no log-probabilities.
    """

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    schema: str | None = None
    logprobs: int | None = None


class BadRequest(Exception):  # noqa: N818
    """A request that cannot be answered; ``message`` may be shown to the client, ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Busy(Exception):  # noqa: N818
    """The queue is full."""

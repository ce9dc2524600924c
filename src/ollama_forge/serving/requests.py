"""What the APIs and a served model exchange: requests in the form common to all APIs, and the events of an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollama_forge.serving.engine.base import EngineError, SamplingParams, ToolCallGrammar
from ollama_forge.text.thinking import ThinkingSplit

Tools = Mapping[str, Mapping[str, Any]]  # the name of each tool, and the JSON schema of its arguments

# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. ``id`` is ``call_`` and eight characters; ``index`` counts the calls of an answer from 0."""

    id: str
    index: int
    name: str
    arguments: Mapping[str, Any]


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
class ChatRequest:
    """A request for an answer, in the form common to all APIs.

    Attributes:
        model: the model's name as the client spells it.
        messages: the conversation; without messages, the model is only loaded or unloaded.
        strength: multiple of a live edit's own strength; 0 is the base model. None: 1.
        raw: the text of the one message is the prompt, without the chat template.
        context: token ids to put before the prompt.
        tools: the tools in OpenAI's format, for the chat template.
        must_call: whether the answer has to call a tool.
        one_call: whether the answer may call one tool at most.
        think: whether to think, or a level; None: as the model does by default.
        num_ctx: maximum number of tokens of prompt and answer; None: as many as the model takes.
        truncate: cut a prompt that is too long, instead of refusing it.
        num_predict: maximum number of generated tokens; below 0: until the model ends or the context is full.
        stop: texts that end the answer; it does not include them.
        format: the JSON schema of the answer as the client sent it, "json" for any object, None for free text.
        logprobs: number of alternatives for each token; None: no log-probabilities.
        choices: number of answers to generate.
        stream: whether the answer is sent as it is generated.
        keep_alive: seconds for which the model stays loaded after the answer; None: as long as before.
        stated: names, as Ollama spells them, of the options that the client sent; the model's own parameters take the
            place of the others (``parameters.with_parameters``).
    """

    model: str
    messages: tuple[Message, ...]
    strength: float | None = None
    raw: bool = False
    context: tuple[int, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: bool = False
    one_call: bool = False
    think: bool | str | None = None
    num_ctx: int | None = None
    truncate: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    format: Any = None
    logprobs: int | None = None
    choices: int = 1
    stream: bool = False
    keep_alive: float | None = None
    stated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prompt:
    """A prompt, rendered, truncated and encoded.

    Attributes:
        ids: the prompt's token ids.
        context: maximum number of tokens of prompt and answer together.
        media: the engine's encoding of the images.
        thinking: the tags around the thought; None: the answer has no thought.
        continues: the prompt ends within a text that the answer continues.
        tools: the tools that were sent; calls of other tools stay text.
    """

    ids: tuple[int, ...]
    context: int
    media: object | None = None
    thinking: ThinkingSplit | None = None
    continues: bool = False
    tools: Tools = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """A request to continue a prompt; see ``ChatRequest`` for the settings.

    Attributes:
        strength: multiple of a live edit's own strength.
        schema: the text of a JSON schema that the answer satisfies.
        calls: the form of the tool calls that the answer consists of; the schema is then that of a plain JSON call.
    """

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    strength: float = 1.0
    schema: str | None = None
    calls: ToolCallGrammar | None = None
    logprobs: int | None = None


class BadRequest(ValueError):  # noqa: N818
    """A request that cannot be answered; ``message`` may be shown to the client, ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Busy(Exception):  # noqa: N818
    """The queue is full; the message is Ollama's."""

    def __init__(self) -> None:
        super().__init__("server busy, please try again.  maximum pending requests exceeded")


# -- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprob:
    """A token's exact text with leading spaces, its bytes, its natural log-probability, and its likeliest rivals."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer: text of the answer or of the thought in whole characters, or calls of tools.

    ``choice`` is the number of the answer, from 0, if a request has several.
    """

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.content or self.thinking or self.tool_calls or self.logprobs)


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: ``stop`` if the model or a stop string ended it, ``length`` if it was cut; ``load`` or ``unload`` if
            nothing was generated.
        cached_tokens: number of the prompt's tokens whose state was kept, so that they were not computed.
        tokens: number of generated tokens, with the one that ended the answer.
        total_ns, load_ns, prompt_ns, answer_ns: nanoseconds in all, in the queue, on the prompt, on the answer.
        stopped_by: the stop string that ended it, if one did.
        context: ids of prompt and answer, for Ollama's ``context``.
        choice: as in ``Delta``.
    """

    reason: str
    prompt_tokens: int = 0
    tokens: int = 0
    total_ns: int = 0
    load_ns: int = 0
    prompt_ns: int = 0
    answer_ns: int = 0
    stopped_by: str | None = None
    context: tuple[int, ...] = ()
    cached_tokens: int = 0
    choice: int = 0


Event = Delta | Done


@dataclass(frozen=True)
class Completion:
    """A complete answer."""

    content: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenLogprob, ...]
    done: Done

    @classmethod
    async def collect_choices(cls, events: AsyncIterator[Event], choices: int) -> list[Completion]:
        """Collect the events of one answer or several until the end of each; the answers in order.

        Raises:
            EngineError: generation failed.
        """
        deltas: list[list[Delta]] = [[] for _ in range(choices)]
        ends: dict[int, Done] = {}
        async for event in events:
            if isinstance(event, Delta):
                deltas[event.choice].append(event)
                continue
            ends[event.choice] = event
            if len(ends) == choices:
                return [cls._of(deltas[choice], ends[choice]) for choice in range(choices)]
        raise EngineError("the answer ended unexpectedly")

    @classmethod
    def _of(cls, deltas: Sequence[Delta], done: Done) -> Completion:
        return cls(
            content="".join(delta.content for delta in deltas),
            thinking="".join(delta.thinking for delta in deltas),
            tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            done=done,
        )

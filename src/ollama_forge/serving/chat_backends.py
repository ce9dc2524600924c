"""Who answers in the terminal chat: a model in this process, or a server that runs already."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from ollama_forge.errors import ForgeError
from ollama_forge.ollama.parameters import NO_PARAMETERS, Parameters, read_shown
from ollama_forge.serving.engine.base import EngineError, SamplingParams
from ollama_forge.serving.requests import BadRequest, Busy, Done, GenerationRequest, Message
from ollama_forge.serving.run_facts import LIVE_KEY

if TYPE_CHECKING:
    from ollama_forge.serving.model import ServedModel

DEFAULT_SERVER = "127.0.0.1:11435"
CHAT_SAMPLING = SamplingParams(repeat_penalty=1.1, repeat_last_n=64)
CHAT_TOKENS = 4096  # the whole context that Ollama gives a model by default
_LOOK_SECONDS = 2.0

Show = Callable[[str, str], None]  # gets each piece of thought and of content


@dataclass(frozen=True)
class ChatSettings:
    """The settings of the terminal chat. Its defaults make repetition less likely; ``serve`` has Ollama's defaults.

    The model's own parameters take the place of the defaults.

    Attributes:
        num_predict: maximum number of tokens of an answer, its thought included; below 0: no maximum.
        num_ctx: maximum number of tokens of prompt and answer; None: as many as the model takes.
        think: True, False or a level such as "high"; None: the model's own default.
        schema: the text of a JSON schema that answers satisfy.
        abliteration_strength: multiple of a live edit's own strength; 0 is the base model.
    """

    sampling: SamplingParams = CHAT_SAMPLING
    num_predict: int = CHAT_TOKENS
    num_ctx: int | None = None
    think: bool | str | None = None
    schema: str | None = None
    abliteration_strength: float = 1.0


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer.

    Attributes:
        tokens: how many were generated.
        truncated: whether it was cut, by ``num_predict`` or because the context was full.
    """

    tokens: int
    truncated: bool


class ChatBackend(Protocol):
    """Answers conversations. ``parameters`` are the model's own; ``live``: it applies its edit at any strength."""

    @property
    def parameters(self) -> Parameters: ...

    @property
    def live(self) -> bool: ...

    def answer(self, messages: Sequence[Message], settings: ChatSettings, show: Show) -> AnswerEnd:
        """Answer, giving ``show`` each piece; an exception of ``show`` or Ctrl-C ends the generation.

        Raises:
            ForgeError: there is no answer, or it broke off.
        """
        ...

    def close(self) -> None:
        """Free what answers are made with."""
        ...


class LocalBackend:
    """Answers by a model that was loaded into this process."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._runner = asyncio.Runner()  # turns Ctrl-C into a cancelled answer
        self.parameters, self.live = model.metadata.parameters, model.live

    def answer(self, messages: Sequence[Message], settings: ChatSettings, show: Show) -> AnswerEnd:
        from ollama_forge.serving.api.exchange import live_strength

        model = self._model
        if settings.think and "thinking" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not support thinking', "leave out --think, or /set think off")
        if any(message.images for message in messages) and "vision" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not see images', "leave out --image")
        try:
            prompt = model.prompts.chat(messages, think=settings.think, num_ctx=settings.num_ctx)
            stop = self.parameters.get("stop")
            request = GenerationRequest(
                prompt,
                settings.sampling,
                settings.num_predict,
                strength=live_strength(model, settings.abliteration_strength),
                stop=stop if isinstance(stop, tuple) else (),
                schema=settings.schema,
            )
            return self._runner.run(self._show(request, show))
        except (BadRequest, EngineError) as error:
            raise ForgeError(str(error)) from error
        except Busy:
            raise ForgeError("the model is busy", "try again") from None

    async def _show(self, request: GenerationRequest, show: Show) -> AnswerEnd:
        async with aclosing(self._model.generate(request)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return AnswerEnd(event.tokens, event.reason == "length")
                show(event.thinking, event.content)
        raise ForgeError("the answer broke off")

    def close(self) -> None:
        self._runner.run(self._model.close())
        self._runner.close()


class RemoteBackend:
    """Answers by a server of this program, through ``/api/chat``."""

    def __init__(self, server: str, name: str, parameters: Parameters = NO_PARAMETERS, *, live: bool = False) -> None:
        self.server, self.name, self.parameters, self.live = server, name, parameters, live

    def answer(self, messages: Sequence[Message], settings: ChatSettings, show: Show) -> AnswerEnd:
        try:
            with closing(self._lines(self._body(messages, settings))) as lines:
                for line in lines:
                    if "error" in line:
                        raise ForgeError(f"the server at {self.server} says: {line['error']}")
                    message = line.get("message") or {}
                    show(message.get("thinking") or "", message.get("content") or "")
                    if line.get("done"):
                        return AnswerEnd(int(line.get("eval_count") or 0), line.get("done_reason") == "length")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ForgeError(f"the server at {self.server} does not answer: {error}", "does it run?") from error
        raise ForgeError(f"the server at {self.server} broke off its answer", "does it run?")

    def _lines(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The objects of a streamed answer, one a line; only a line feed ends a line."""
        url = f"{_url(self.server)}/api/chat"
        with httpx.stream("POST", url, json=body, timeout=None, trust_env=False) as response:
            held = b""
            for chunk in response.iter_bytes():
                *whole, held = (held + chunk).split(b"\n")
                for line in filter(None, whole):
                    yield _object(line)
            if held:
                yield _object(held)

    def _body(self, messages: Sequence[Message], settings: ChatSettings) -> dict[str, Any]:
        options = {**asdict(settings.sampling), "num_predict": settings.num_predict, "num_ctx": settings.num_ctx}
        if self.live:
            options["abliteration_strength"] = settings.abliteration_strength
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_message_body(message) for message in messages],
            "options": {key: value for key, value in options.items() if value is not None},
            "stream": True,
        }
        if settings.think is not None:
            body["think"] = settings.think
        if settings.schema is not None:
            body["format"] = json.loads(settings.schema)
        return body

    def close(self) -> None:
        """Nothing is held between answers."""


def running_server(server: str, name: str) -> RemoteBackend | None:
    """The server at ``HOST:PORT``; None unless it is this program's and serves ``name``."""
    try:
        response = httpx.get(f"{_url(server)}/api/tags", timeout=_LOOK_SECONDS, trust_env=False)
        models = response.json().get("models") or []
        names = {str(model["name"]).lower().removesuffix(":latest") for model in models}
        ours = response.headers.get("Server", "").startswith("ollama-forge/")
        if not ours or name.lower().removesuffix(":latest") not in names:
            return None
        body = {"model": name}
        facts = httpx.post(f"{_url(server)}/api/show", json=body, timeout=_LOOK_SECONDS, trust_env=False).json()
        live = LIVE_KEY in (facts.get("model_info") or {})
        return RemoteBackend(server, name, read_shown(str(facts.get("parameters") or "")), live=live)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, AttributeError, TypeError):
        return None


def _url(server: str) -> str:
    return (server if "://" in server else f"http://{server}").rstrip("/")


def _object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("its answer is not a JSON object")
    return value


def _message_body(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        turn["thinking"] = message.thinking
    if message.images:
        turn["images"] = [base64.b64encode(image).decode() for image in message.images]
    return turn

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
from ollama_forge.serving.engine.base import EngineError, SamplingParams
from ollama_forge.serving.requests import BadRequest, Busy, Done, GenerationRequest, Message

if TYPE_CHECKING:
    from ollama_forge.serving.model import ServedModel

DEFAULT_SERVER = "127.0.0.1:11435"
CHAT_SAMPLING = SamplingParams(repeat_penalty=1.1, repeat_last_n=64)
CHAT_TOKENS = 4096  # the whole context that Ollama gives a model by default
_LOOK_SECONDS = 2.0

Show = Callable[[str, str], None]  # gets each piece of thought and of content


@dataclass(frozen=True)
class Wishes:
    """The settings of the terminal chat. Its defaults hold off loops; ``serve`` has Ollama's.

    Attributes:
        num_predict: the most tokens of an answer, its thought included; below 0: no bound.
        num_ctx: the most tokens of prompt and answer; None: as many as the model takes.
        think: True, False or a level such as "high"; None: the model's own default.
        schema: the text of a JSON schema that answers satisfy.
    """

    sampling: SamplingParams = CHAT_SAMPLING
    num_predict: int = CHAT_TOKENS
    num_ctx: int | None = None
    think: bool | str | None = None
    schema: str | None = None


@dataclass(frozen=True)
class Ended:
    """The end of an answer.

    Attributes:
        tokens: how many were generated.
        full: whether it was cut, by ``num_predict`` or because the context was full.
    """

    tokens: int
    full: bool


class Talker(Protocol):
    """Answers conversations."""

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> Ended:
        """Answer, giving ``show`` each piece; an exception of ``show`` or Ctrl-C ends the generation.

        Raises:
            ForgeError: there is no answer, or it broke off.
        """
        ...

    def close(self) -> None:
        """Free what answers are made with."""
        ...


class LocalTalker:
    """Answers by a model that was loaded into this process."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._runner = asyncio.Runner()  # turns Ctrl-C into a cancelled answer

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> Ended:
        model = self._model
        if wishes.think and "thinking" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not support thinking', "leave out --think, or /set think off")
        if any(message.images for message in messages) and "vision" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not see images', "leave out --image")
        try:
            prompt = model.chat_prompt(messages, think=wishes.think, num_ctx=wishes.num_ctx)
            ask = GenerationRequest(prompt, wishes.sampling, wishes.num_predict, schema=wishes.schema)
            return self._runner.run(self._say(ask, show))
        except (BadRequest, EngineError) as error:
            raise ForgeError(str(error)) from error
        except Busy:
            raise ForgeError("the model is busy", "try again") from None

    async def _say(self, ask: GenerationRequest, show: Show) -> Ended:
        async with aclosing(self._model.generate(ask)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return Ended(event.tokens, event.reason == "length")
                show(event.thinking, event.content)
        raise ForgeError("the answer broke off")

    def close(self) -> None:
        self._runner.run(self._model.close())
        self._runner.close()


class RemoteTalker:
    """Answers by a server of this program, through ``/api/chat``."""

    def __init__(self, server: str, name: str) -> None:
        self.server, self.name = server, name

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> Ended:
        try:
            with closing(self._lines(self._body(messages, wishes))) as lines:
                for line in lines:
                    if "error" in line:
                        raise ForgeError(f"the server at {self.server} says: {line['error']}")
                    message = line.get("message") or {}
                    show(message.get("thinking") or "", message.get("content") or "")
                    if line.get("done"):
                        return Ended(int(line.get("eval_count") or 0), line.get("done_reason") == "length")
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

    def _body(self, messages: Sequence[Message], wishes: Wishes) -> dict[str, Any]:
        options = {**asdict(wishes.sampling), "num_predict": wishes.num_predict, "num_ctx": wishes.num_ctx}
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_turn(message) for message in messages],
            "options": {key: value for key, value in options.items() if value is not None},
            "stream": True,
        }
        if wishes.think is not None:
            body["think"] = wishes.think
        if wishes.schema is not None:
            body["format"] = json.loads(wishes.schema)
        return body

    def close(self) -> None:
        """Nothing is held between answers."""


def running_server(server: str, name: str) -> RemoteTalker | None:
    """The server at ``HOST:PORT``; None unless it is this program's and serves ``name``."""
    try:
        response = httpx.get(f"{_url(server)}/api/tags", timeout=_LOOK_SECONDS, trust_env=False)
        models = response.json().get("models") or []
        names = {str(model["name"]).lower().removesuffix(":latest") for model in models}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, AttributeError, TypeError):
        return None
    ours = response.headers.get("Server", "").startswith("ollama-forge/")
    return RemoteTalker(server, name) if ours and name.lower().removesuffix(":latest") in names else None


def _url(server: str) -> str:
    return (server if "://" in server else f"http://{server}").rstrip("/")


def _object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("its answer is not a JSON object")
    return value


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        turn["thinking"] = message.thinking
    if message.images:
        turn["images"] = [base64.b64encode(image).decode() for image in message.images]
    return turn

"""Who answers in the terminal chat: a model in this process, or a server that runs already."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ollama_forge.errors import ForgeError
from ollama_forge.serving.asks import Ask, BadRequest, Busy, Message
from ollama_forge.serving.engines.base import EngineError, Sampling
from ollama_forge.serving.events import Delta

if TYPE_CHECKING:
    from ollama_forge.serving.served import ServedModel

DEFAULT_SERVER = "127.0.0.1:11435"
_LOOK_SECONDS = 2.0

Show = Callable[[str, str], None]  # gets each piece of thought and of content


@dataclass(frozen=True)
class Wishes:
    """How answers are wanted.

    Attributes:
        think: on, off, a level, or None: as the model does by itself.
        schema: a JSON schema, as text, that answers satisfy.
    """

    sampling: Sampling = field(default_factory=Sampling)
    num_predict: int = -1
    num_ctx: int | None = None
    think: bool | str | None = None
    schema: str | None = None


class Talker(Protocol):
    """Answers a conversation, piece by piece. What ``show`` got before an interrupt was said.

    Raises:
        ForgeError: there is no answer to this.
    """

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> None: ...

    def close(self) -> None: ...


class LocalTalker:
    """A served model in this process."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._runner = asyncio.Runner()  # turns Ctrl-C into a cancelled answer

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> None:
        model = self._model
        if wishes.think and "thinking" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not support thinking', "leave out --think")
        if any(message.images for message in messages) and "vision" not in model.capabilities:
            raise ForgeError(f'"{model.name}" does not see images', "leave out --image")
        try:
            prompt = model.chat_prompt(messages, think=wishes.think, num_ctx=wishes.num_ctx)
            self._runner.run(self._say(Ask(prompt, wishes.sampling, wishes.num_predict, schema=wishes.schema), show))
        except (BadRequest, EngineError) as error:
            raise ForgeError(str(error)) from error
        except Busy:
            raise ForgeError("the model is busy", "try again") from None

    async def _say(self, ask: Ask, show: Show) -> None:
        async with aclosing(self._model.answer(ask)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    show(event.thinking, event.content)

    def close(self) -> None:
        self._runner.run(self._model.close())
        self._runner.close()


class RemoteTalker:
    """A server of this program, through ``/api/chat``."""

    def __init__(self, server: str, name: str) -> None:
        self.server, self.name = server, name

    def answer(self, messages: Sequence[Message], wishes: Wishes, show: Show) -> None:
        body = self._body(messages, wishes)
        with closing(http.client.HTTPConnection(self.server)) as connection:
            try:
                connection.request("POST", "/api/chat", json.dumps(body), {"Content-Type": "application/json"})
                for line in _lines(connection.getresponse()):
                    if "error" in line:
                        raise ForgeError(f"the server at {self.server} says: {line['error']}")
                    message = line.get("message") or {}
                    show(message.get("thinking") or "", message.get("content") or "")
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ForgeError(f"the server at {self.server} does not answer: {error}", "does it run?") from error

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
    """The server there, if it is one of this program's and serves ``name``."""
    with closing(http.client.HTTPConnection(server, timeout=_LOOK_SECONDS)) as connection:
        try:
            connection.request("GET", "/api/tags")
            response = connection.getresponse()
            models = json.load(response).get("models") or []
            names = {str(model["name"]).lower().removesuffix(":latest") for model in models}
        except (OSError, http.client.HTTPException, ValueError, LookupError, AttributeError, TypeError):
            return None
        ours = (response.headers["Server"] or "").startswith("ollama-forge/")
    return RemoteTalker(server, name) if ours and name.lower().removesuffix(":latest") in names else None


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        turn["thinking"] = message.thinking
    if message.images:
        turn["images"] = [base64.b64encode(image).decode() for image in message.images]
    return turn


def _lines(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.strip():
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("what comes is not Ollama's")
            yield value

"""A chat model on a server: Ollama's ``/api/chat``, or ``/v1/chat/completions`` of any OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.models.servers.connection import Connection, ask_all, pick_model
from ollama_forge.prompts.conversation import Prompt, messages_of
from ollama_forge.text.tokenizer import Tokenizer

REQUESTS = 4  # at once
_APIS = ((True, "/api/tags", "models", "name"), (False, "/v1/models", "data", "id"))  # Ollama's, OpenAI's


@dataclass(frozen=True)
class ChatServer:
    """A model on a server that gives texts.

    Attributes:
        url: the address, without ``/v1`` and without a slash at the end.
        model: its name there.
        ollama: whether the server has Ollama's own API; else OpenAI's.
        described: what the server says of the model, such as its digest, so that a change of it is seen.
        key: the bearer token; None for none.
    """

    url: str
    model: str
    ollama: bool
    described: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, connection: Connection, model: str, *, by_openai: bool = False) -> ChatServer:
        """Ask a server for its models.

        Args:
            model: its name there; "" where the server has one alone.
            by_openai: use OpenAI's API, whatever else the server has.

        Raises:
            UsageError: the model is not the server's.
            ForgeError: the server cannot be reached, or has neither API.
        """
        ollama, models = _models(connection, _APIS[1:] if by_openai else _APIS)
        found = pick_model(connection, model, list(models))
        return cls(connection.url, found, ollama, models[found], connection.key)

    def answers(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, progress: Callable[[int], None]
    ) -> list[str]:
        """Greedy answers, a few requests at a time; thoughts are switched off where the server allows it.

        Args:
            tokenizer: that of the base model, for the system prompt and the template's switch of the thought.
            progress: called with the number of newly answered prompts.

        Raises:
            ForgeError: the server fails or refuses a request.
        """
        with Connection(self.url, self.key) as connection:
            ask = partial(self._answer, connection, limit=max_new_tokens, tokenizer=tokenizer)
            return ask_all(ask, prompts, REQUESTS, progress)

    def _answer(self, connection: Connection, prompt: Prompt, *, limit: int, tokenizer: Tokenizer) -> str:
        messages = messages_of(prompt)
        if tokenizer.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": tokenizer.system}, *messages]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": False}
        if self.ollama:
            # Ollama's own default of repeat_penalty would make another answer of the same weights.
            options = {"temperature": 0, "num_predict": limit, "repeat_penalty": 1.0}
            content = connection.request("/api/chat", {**body, "think": False, "options": options})
            found = content.get("message")
        else:
            switch = tokenizer.template.thinking_arguments(False)
            extra = {"chat_template_kwargs": switch} if switch else {}
            body |= {"temperature": 0, "max_tokens": limit, **extra}
            choices = connection.request("/v1/chat/completions", body).get("choices")
            found = choices[0].get("message") if choices else None
        if not isinstance(found, dict):
            raise ForgeError(f"{self.url} gives an answer without a message", "check that it serves a chat model")
        text = str(found.get("content") or "")
        closing = tokenizer.thinking.closing if tokenizer.thinking is not None else ""
        return text.rpartition(closing)[2].lstrip() if closing and closing in text else text


def _models(
    connection: Connection, apis: Sequence[tuple[bool, str, str, str]]
) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether a server has Ollama's API, and what it says of each of its models."""
    problems = []
    for ollama, route, key, name in apis:
        try:
            entries = connection.request(route)[key]
            # Only what tells one model from another: other fields, such as times of use, change by themselves.
            kept = ("digest", "modified_at") if ollama else ("created", "owned_by")
            return ollama, {str(e[name]): {k: e[k] for k in kept if k in e} for e in entries}
        except (ForgeError, KeyError, TypeError) as error:
            problems.append(error.message if isinstance(error, ForgeError) else f"{route} is not a list of models")
    raise ForgeError(
        f"no model server answers at {connection.url}: {problems[-1]}", "give the address of an Ollama or OpenAI server"
    )

"""A chat model on a server: Ollama's ``/api/chat``, or ``/v1/chat/completions`` of any OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from ollama_forge.errors import ForgeError, UsageError, error_line
from ollama_forge.ollama_address import is_loopback
from ollama_forge.prompts.conversation import Prompt, messages_of
from ollama_forge.text.tokenizer import Tokenizer

REQUESTS = 4  # at once
_RETRIES = 2  # of a connection that fails
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0
_NAMED = 10  # models in a message


@dataclass(frozen=True)
class ChatServer:
    """A model on a server. The API key is the environment's ``OPENAI_API_KEY``, if it is set.

    Attributes:
        url: the address, without ``/v1`` and without a slash at the end.
        model: its name there.
        ollama: whether the server has Ollama's own API; else OpenAI's.
        described: what the server says of the model, such as its digest, so that a change of it is seen.
    """

    url: str
    model: str
    ollama: bool
    described: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, address: str) -> ChatServer:
        """Ask a server for its models.

        Args:
            address: ``URL`` or ``URL#MODEL``; the model may be left out where the server has one alone.

        Raises:
            UsageError: the address is no URL, or the model is not the server's.
            ForgeError: the server cannot be reached, or has neither API.
        """
        place, _, name = address.partition("#")
        url = place.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{address} is not the address of a server", "for example http://127.0.0.1:11434#MODEL")
        with _client(url) as client:
            ollama, models = _models(client, address)
        if not name and len(models) == 1:
            name = next(iter(models))
        found = next((known for known in (name, f"{name}:latest") if known in models), None)
        if found is None:
            listed = ", ".join(sorted(models)[:_NAMED]) or "none"
            problem = f"{url} has no model {name}" if name else f"{url} has {len(models)} models"
            raise UsageError(problem, f"give {url}#MODEL; its models: {listed}")
        return cls(url, found, ollama, models[found])

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
        with _client(self.url) as client, ThreadPoolExecutor(REQUESTS) as pool:

            def answer(prompt: Prompt) -> str:
                messages = messages_of(prompt)
                if tokenizer.system is not None and messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": tokenizer.system}, *messages]
                return self._answer(client, messages, max_new_tokens, tokenizer)

            out = []
            for text in pool.map(answer, prompts):
                out.append(text)
                progress(1)
        return out

    def _answer(self, client: httpx.Client, messages: list[dict[str, str]], limit: int, tokenizer: Tokenizer) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": False}
        if self.ollama:
            # Ollama's own default of repeat_penalty would make another answer of the same weights.
            options = {"temperature": 0, "num_predict": limit, "repeat_penalty": 1.0}
            content = _request(client, "POST", "/api/chat", {**body, "think": False, "options": options})
            found = content.get("message")
        else:
            switch = tokenizer.template.thinking_arguments(False)
            extra = {"chat_template_kwargs": switch} if switch else {}
            body |= {"temperature": 0, "max_tokens": limit, **extra}
            content = _request(client, "POST", "/v1/chat/completions", body)
            choices = content.get("choices")
            found = choices[0].get("message") if choices else None
        if not isinstance(found, dict):
            raise ForgeError(f"{self.url} gives an answer without a message", "check that it serves a chat model")
        text = str(found.get("content") or "")
        closing = tokenizer.thinking.closing if tokenizer.thinking is not None else ""
        return text.rpartition(closing)[2].lstrip() if closing and closing in text else text


def _client(url: str) -> httpx.Client:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        transport=httpx.HTTPTransport(retries=_RETRIES) if is_loopback(httpx.URL(url).host) else None,
        follow_redirects=True,
    )


def _models(client: httpx.Client, address: str) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether a server has Ollama's API, and what it says of each of its models."""
    problems = []
    for ollama, route, key, name in ((True, "/api/tags", "models", "name"), (False, "/v1/models", "data", "id")):
        try:
            entries = _request(client, "GET", route, None)[key]
            # Only what tells one model from another: other fields, such as times of use, change by themselves.
            kept = ("digest", "modified_at") if ollama else ("created", "owned_by")
            return ollama, {str(e[name]): {k: e[k] for k in kept if k in e} for e in entries}
        except (ForgeError, KeyError, TypeError) as error:
            problems.append(error.message if isinstance(error, ForgeError) else f"{route} is not a list of models")
    raise ForgeError(
        f"no model server answers at {address}: {problems[-1]}", "give the address of an Ollama or OpenAI server"
    )


def _request(client: httpx.Client, method: str, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
    try:
        answer = client.request(method, route, json=body)
        content = answer.json() if answer.content else {}
    except (httpx.HTTPError, ValueError) as error:
        raise ForgeError(
            f"{client.base_url} fails at {route} ({error_line(error)})", "check that the server runs, then start again"
        ) from error
    if answer.is_error or not isinstance(content, dict):
        reason = content.get("error", answer.reason_phrase) if isinstance(content, dict) else answer.reason_phrase
        message = reason.get("message", reason) if isinstance(reason, dict) else reason
        raise ForgeError(
            f"{client.base_url} refuses {route}: {answer.status_code} {str(message)[:200]}", "check the model's name"
        )
    return content

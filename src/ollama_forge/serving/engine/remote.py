"""The engine that forwards to a llama-server or a vLLM elsewhere: prompts and outputs travel as token ids."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from ollama_forge.errors import ForgeError, UsageError, error_line
from ollama_forge.evaluation.tokens import check_tokens
from ollama_forge.ollama_address import is_loopback
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Logprob, Token
from ollama_forge.serving.engine.llama_completion import TokenReader, completion_body
from ollama_forge.serving.engine.two_phase import Phase, Vocabulary, in_phases
from ollama_forge.text.tokenizer import Ids, Tokenizer

_CLOSED = "the model was unloaded"
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # seconds
_EXAMPLE = "for example http://127.0.0.1:8080, or http://127.0.0.1:8000#MODEL"
_TOKEN_ID = "token_id:"
_WITH_SCHEMAS = (0, 11)  # the first vLLM that takes structured_outputs; older ones ignore it in silence


class RemoteServer(Protocol):
    """What the engine asks of a kind of server.

    Attributes:
        context_length: maximum number of tokens of prompt and output; None: the server does not say.
    """

    name: str
    context_length: int | None

    def tokenize(self, client: httpx.Client, text: str) -> Ids | None:
        """The server's tokens of a text, special tokens included; None if it does not tokenize."""

    def stream(self, link: Link, phase: Phase, vocabulary: Vocabulary) -> AsyncGenerator[Token, None]:
        """The tokens of one phase."""


@dataclass(frozen=True)
class Link:
    """The connection of one request.

    Attributes:
        streams: the responses that are being read.
    """

    client: httpx.AsyncClient
    streams: dict[httpx.Response, asyncio.AbstractEventLoop]

    async def events(self, route: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream of server-sent events; closing it closes the connection."""
        async with self.client.stream("POST", route, json=body) as response:
            if response.is_error:
                await response.aread()
                raise _refusal(response)
            self.streams[response] = asyncio.get_running_loop()
            try:
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        event: dict[str, Any] = json.loads(data)
                        if "error" in event:
                            raise EngineError(f"the server failed: {_reason(event)}")
                        yield event
            finally:
                del self.streams[response]


class LlamaServerProtocol:
    """llama-server's ``/completion``."""

    name = "llama-server"

    def __init__(self, context_length: int | None) -> None:
        self.context_length = context_length

    def tokenize(self, client: httpx.Client, text: str) -> Ids | None:
        body = {"content": text, "add_special": False, "parse_special": True}
        ids: Ids = _answer(client, "/tokenize", body)["tokens"]
        return ids

    async def stream(self, link: Link, phase: Phase, vocabulary: Vocabulary) -> AsyncGenerator[Token, None]:
        reader = TokenReader(phase, vocabulary)

        async def replay(count: int) -> list[int]:
            body = reader.replay_body(count)
            if body is None:
                return []
            response = await link.client.post("/completion", json=body)
            ids: list[int] = response.json().get("tokens", []) if response.is_success else []
            return ids

        async with aclosing(link.events("/completion", completion_body(phase))) as chunks:
            async for chunk in chunks:
                missing = reader.missing(chunk)
                if chunk.get("stop"):
                    tokens = reader.tail(chunk, await replay(missing)) if missing > 0 else []
                else:
                    read = reader.read(chunk)
                    tokens = reader.fill(chunk, await replay(missing)) if read is None else read
                for token in tokens:
                    yield token


class VllmProtocol:
    """vLLM's ``/v1/completions``.

    Args:
        version: vLLM's, such as (0, 32).
    """

    name = "vLLM"

    def __init__(self, model: str, version: tuple[int, ...], context_length: int | None) -> None:
        self.model, self.version, self.context_length = model, version, context_length

    def tokenize(self, client: httpx.Client, text: str) -> Ids | None:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            ids: Ids = _answer(client, "/tokenize", body)["tokens"]
        except ForgeError:  # it is built without this route
            return None
        return ids

    async def stream(self, link: Link, phase: Phase, vocabulary: Vocabulary) -> AsyncGenerator[Token, None]:
        async with aclosing(link.events("/v1/completions", self._body(phase))) as chunks:
            async for chunk in chunks:
                for choice in chunk.get("choices", ()):
                    if "token_ids" not in choice:
                        raise EngineError("this server returns no token ids (return_token_ids): vLLM is too old")
                    for token in _vllm_tokens(choice, phase.request.top_logprobs):
                        yield token

    def _body(self, phase: Phase) -> dict[str, Any]:
        request, params = phase.request, phase.request.sampling
        penalised = params.repeat_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if params.typical_p < 1:
            raise EngineError("vLLM has no typical_p")
        if penalised and 0 <= params.repeat_last_n < len(request.ids) + request.max_tokens:
            raise EngineError("vLLM penalises all tokens, not the last ones alone: set repeat_last_n to -1")
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.ids),
            "max_tokens": request.max_tokens,
            "stream": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": sorted(request.end_ids),
            "temperature": params.temperature,
            "top_k": params.top_k if params.top_k > 0 else -1,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": params.repeat_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
        }
        if params.seed is not None:
            body["seed"] = params.seed % (1 << 63)
        if request.top_logprobs is not None:
            body |= {"logprobs": request.top_logprobs, "return_tokens_as_token_ids": True}
        if phase.must_go_on:
            body["min_tokens"] = request.max_tokens  # no end token before
        if phase.schema is not None:
            if self.version < _WITH_SCHEMAS:
                raise EngineError("this vLLM is too old for structured outputs (format); 0.11 has them")
            body["structured_outputs"] = {"json": json.loads(phase.schema)}
        return body


def _vllm_tokens(choice: Mapping[str, Any], top: int | None) -> list[Token]:
    ids, found = choice["token_ids"] or [], choice.get("logprobs")
    if top is None or not found:
        return [*map(Token, ids)]
    tokens = []
    for place, id_ in enumerate(ids):
        rivals = (found.get("top_logprobs") or [{}] * len(ids))[place] or {}
        entries = [Logprob(int(text.removeprefix(_TOKEN_ID)), value) for text, value in rivals.items()]
        entries.sort(key=lambda entry: -entry.value)
        tokens.append(Token(id_, found["token_logprobs"][place], tuple(entries[:top])))
    return tokens


class RemoteEngine:
    """Generates with a server elsewhere. It neither embeds nor takes images.

    Args:
        context: the model's own context length; the server's may be shorter.
    """

    def __init__(self, url: str, server: RemoteServer, tokenizer: Tokenizer, *, context: int, slots: int) -> None:
        self.url, self.server, self._slots = url, server, slots
        self._vocabulary = Vocabulary(tokenizer)
        self._context_length = min(context, server.context_length or context)
        self._verify = httpx.create_ssl_context()  # building one takes tens of milliseconds
        self._streams: dict[httpx.Response, asyncio.AbstractEventLoop] = {}
        self._closed = False

    @classmethod
    def connect(cls, address: str, tokenizer: Tokenizer, *, context: int, slots: int) -> RemoteEngine:
        """Ask a server what it is, and whether its tokens are those of the checkpoint.

        Args:
            address: ``URL``, or ``URL#MODEL`` for a vLLM with several models. The API key is the environment's
                ``OPENAI_API_KEY``, if it is set.

        Raises:
            UsageError: the address is not a URL, or the server does not have the model.
            ForgeError: no llama-server or vLLM answers there, or its tokens are others.
        """
        place, _, model = address.partition("#")
        url = place.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{address} is not the address of a server", _EXAMPLE)
        with httpx.Client(**_settings(url)) as client:
            server = _find(client, model)
            if server.tokenize(client, "a") is not None:
                check = check_tokens(tokenizer, lambda text: server.tokenize(client, text) or [])
                if check.garbled:
                    raise ForgeError(
                        f"{url} has another tokenizer: {check.garbled} of {check.texts} texts are other tokens there",
                        "give the checkpoint that the server runs with --checkpoint",
                    )
        return cls(url, server, tokenizer, context=context, slots=slots)

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests; false after ``close``."""
        return not self._closed

    @property
    def context_length(self) -> int:
        return self._context_length

    async def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        """Stream the tokens of a request; closing the iterator (``aclose``) closes the connection, which cancels it.

        Raises:
            EngineError: the prompt is too long; or the server cannot do what is asked for, failed, or is not reached.
        """
        length = len(request.ids)
        if length > self._context_length:
            raise EngineError(f"the prompt has {length} tokens, more than the context length {self._context_length}")
        limit = min(request.max_tokens, self._context_length - length)
        if self._closed:
            raise EngineError(_CLOSED)
        if limit <= 0:
            return
        async with self._link() as link:

            def run(phase: Phase) -> AsyncGenerator[Token, None]:
                return self.server.stream(link, phase, self._vocabulary)

            async with aclosing(in_phases(run, replace(request, max_tokens=limit), self._vocabulary)) as tokens:
                async for token in tokens:
                    if token.id in request.end_ids:
                        return
                    yield token

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[Link]:
        try:
            async with httpx.AsyncClient(**_settings(self.url), verify=self._verify) as client:
                yield Link(client, self._streams)
        except (httpx.HTTPError, httpx.StreamError, ValueError, KeyError) as error:
            raise EngineError(_CLOSED if self._closed else f"{self.url} fails: {error_line(error)}") from error

    def close(self) -> None:
        """End all requests with an error."""
        self._closed = True
        for response, loop in list(self._streams.items()):
            asyncio.run_coroutine_threadsafe(response.aclose(), loop)


def _settings(url: str) -> dict[str, Any]:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": _TIMEOUT,
        "trust_env": not is_loopback(httpx.URL(url).host),  # no proxy reaches this machine's own servers
    }


def _find(client: httpx.Client, model: str) -> RemoteServer:
    """Find out which kind of server answers.

    Raises:
        UsageError: a vLLM does not have the model.
        ForgeError: it is neither of the kinds.
    """
    try:
        version, listed = _answer(client, "/version").get("version"), _answer(client, "/v1/models").get("data")
        if not version or not isinstance(listed, list):
            raise ForgeError("it says no version")
    except ForgeError as error:
        return _find_llama_server(client, error)
    models = {str(entry["id"]): entry for entry in listed}
    found = model or (next(iter(models)) if len(models) == 1 else "")
    if found not in models:
        raise UsageError(
            f"{client.base_url} has no model {model}" if model else f"{client.base_url} has {len(models)} models",
            f"add #MODEL to the URL; its models: {', '.join(sorted(models)[:10]) or 'none'}",
        )
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(version))[:2])
    return VllmProtocol(found, numbers, models[found].get("max_model_len"))


def _find_llama_server(client: httpx.Client, problem: ForgeError) -> LlamaServerProtocol:
    try:
        settings = _answer(client, "/props")["default_generation_settings"]
        return LlamaServerProtocol(settings.get("n_ctx"))
    except (ForgeError, KeyError, AttributeError):
        raise ForgeError(
            f"neither a llama-server nor a vLLM answers at {client.base_url}: {problem.message}", _EXAMPLE
        ) from None


def _answer(client: httpx.Client, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The object at a route; with a body, it is posted."""
    try:
        response = client.request("GET" if body is None else "POST", route, json=body)
        content = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ForgeError(f"{route} fails: {error_line(error)}", "check that the server runs") from error
    if response.is_error or not isinstance(content, dict):
        raise ForgeError(f"{route} answers {response.status_code}", "check that the server runs")
    return content


def _refusal(response: httpx.Response) -> EngineError:
    try:
        reason = _reason(response.json())
    except ValueError:
        reason = response.reason_phrase
    return EngineError(f"the server refuses the request: {response.status_code} {reason}")


def _reason(content: Any) -> str:
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]

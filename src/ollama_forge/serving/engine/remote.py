"""The engine that forwards to a llama-server or a vLLM elsewhere: prompts and outputs travel as token ids."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from ollama_forge.errors import ForgeError, error_line
from ollama_forge.evaluation.tokens import check_server_tokens
from ollama_forge.models.servers.connection import reason_of
from ollama_forge.models.servers.find import find_token_server
from ollama_forge.models.servers.token_server import TokenServer
from ollama_forge.models.servers.vllm import VllmServer
from ollama_forge.models.servers.vllm_process import StartedVllm
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Logprob, Token
from ollama_forge.serving.engine.llama_completion import TokenReader, completion_body
from ollama_forge.serving.engine.two_phase import Phase, Vocabulary, in_phases
from ollama_forge.text.tokenizer import Tokenizer

_CLOSED = "the model was unloaded"
_TOKEN_ID = "token_id:"
_WITH_SCHEMAS = (0, 11)  # the first vLLM that takes structured_outputs; older ones ignore it in silence


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
                            raise EngineError(f"the server failed: {reason_of(event)}")
                        yield event
            finally:
                del self.streams[response]


class LlamaServerStream:
    """llama-server's ``/completion``."""

    async def stream(self, link: Link, phase: Phase, vocabulary: Vocabulary) -> AsyncGenerator[Token, None]:
        reader = TokenReader(phase, vocabulary)
        async with aclosing(link.events("/completion", completion_body(phase))) as chunks:
            async for chunk in chunks:
                body = reader.replay_body(chunk)
                for token in reader.read(chunk, [] if body is None else await self._replay(link, body)):
                    yield token

    async def _replay(self, link: Link, body: Mapping[str, Any]) -> list[int]:
        response = await link.client.post("/completion", json=body)
        ids: list[int] = response.json().get("tokens", []) if response.is_success else []
        return ids


@dataclass(frozen=True)
class VllmStream:
    """vLLM's ``/v1/completions``."""

    server: VllmServer

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
        body = self.server.body(request.ids, request.max_tokens, request.end_ids) | {
            "stream": True,
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
            if self.server.release < _WITH_SCHEMAS:
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
        end: called when the engine is closed.
    """

    def __init__(
        self,
        server: TokenServer,
        tokenizer: Tokenizer,
        *,
        context: int,
        slots: int,
        end: Callable[[], None] | None = None,
    ) -> None:
        self.server, self._slots, self._end = server, slots, end
        self._stream = VllmStream(server) if isinstance(server, VllmServer) else LlamaServerStream()
        self._vocabulary = Vocabulary(tokenizer)
        self._context_length = min(context, server.context_length or context)
        self._verify = httpx.create_ssl_context()  # building one takes tens of milliseconds
        self._streams: dict[httpx.Response, asyncio.AbstractEventLoop] = {}
        self._closed = False

    @classmethod
    def connect(cls, address: str, tokenizer: Tokenizer, *, context: int, slots: int) -> RemoteEngine:
        """Ask a server what it is, and whether its tokens are those of the checkpoint.

        Args:
            address: ``URL``, or ``URL#MODEL`` for a vLLM with several models.

        Raises:
            UsageError: the address is not a URL, or the server does not have the model.
            ForgeError: no llama-server or vLLM answers there, or its tokens are others.
        """
        server = find_token_server(address)
        garbled = check_server_tokens(server, tokenizer)
        if garbled is not None:
            raise ForgeError(
                f"{server.connection.url} {garbled}", "give the checkpoint that the server runs with --checkpoint"
            )
        return cls(server, tokenizer, context=context, slots=slots)

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests; false after ``close``, and once a vLLM started for it has died."""
        return not self._closed and (not isinstance(self.server, StartedVllm) or self.server.alive)

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
                return self._stream.stream(link, phase, self._vocabulary)

            async with aclosing(in_phases(run, replace(request, max_tokens=limit), self._vocabulary)) as tokens:
                async for token in tokens:
                    if token.id in request.end_ids:
                        return
                    yield token

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[Link]:
        try:
            async with httpx.AsyncClient(**self.server.connection.settings, verify=self._verify) as client:
                yield Link(client, self._streams)
        except (httpx.HTTPError, httpx.StreamError, ValueError, KeyError) as error:
            failure = f"{self.server.name} fails: {error_line(error)}"
            raise EngineError(_CLOSED if self._closed else failure) from error

    def close(self) -> None:
        """End all requests with an error."""
        self._closed = True
        for response, loop in list(self._streams.items()):
            asyncio.run_coroutine_threadsafe(response.aclose(), loop)
        self.server.connection.close()
        if self._end is not None:
            self._end()


def _refusal(response: httpx.Response) -> EngineError:
    try:
        reason = reason_of(response.json())
    except ValueError:
        reason = response.reason_phrase
    return EngineError(f"the server refuses the request: {response.status_code} {reason}")

"""Constraints for engines whose server cannot begin a grammar in the middle of an output: the output in two phases.

First the thought is generated freely, then the server continues behind it with the schema.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.text.detokenize import TokenBytes
from ollama_forge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Phase:
    """One request to the server.

    Attributes:
        request: the prompt with what was generated before this phase, and the number of tokens that are left.
        schema: the JSON schema as text; None: free text.
        must_go_on: the tokens that end an output must not be generated.
    """

    request: EngineRequest
    schema: str | None = None
    must_go_on: bool = False


class Vocabulary:
    """A tokenizer's tokens as bytes, and the tokens of a piece of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = TokenBytes(tokenizer.backend)
        self._backend = tokenizer.backend
        ids = range(len(tokenizer.backend))
        self.ids = {self.tokens.of(id_): id_ for id_ in reversed(ids) if id_ not in self.tokens.special}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend(text, add_special_tokens=False).input_ids
        return ids


async def in_phases(
    run: Callable[[Phase], AsyncGenerator[Token, None]], request: EngineRequest, vocabulary: Vocabulary
) -> AsyncGenerator[Token, None]:
    """Stream the tokens of a request, whose constraint may begin after a text.

    A forced call is plain JSON, which is read as a call in every format but that of gpt-oss's channels. There the text
    before the arguments is given, and the arguments are generated.

    Args:
        run: streams the tokens of one phase; closing it cancels the phase.

    Raises:
        EngineError: one of several tools has to be called in a channel.
    """
    constraint = request.constraint
    schema = constraint.schema if constraint else None
    if constraint is not None and constraint.calls is not None and constraint.calls.thought is not None:
        if len(constraint.calls.tools) > 1:
            raise EngineError(
                "this engine cannot make the model choose a tool in its channels: name one tool in tool_choice, "
                "or start the server with --engine transformers"
            )
        (tool,) = constraint.calls.tools
        opening, schema = vocabulary.encode(tool.opening)[: request.max_tokens], tool.schema
        for id_ in opening:
            yield Token(id_)
        if len(opening) == request.max_tokens:
            return
        ids, left = (*request.ids, *opening), request.max_tokens - len(opening)
        request, constraint = replace(request, ids=ids, max_tokens=left), None
    if constraint is not None and constraint.after:
        written: list[int] = []
        texts = [text.encode() for text in constraint.after]
        free = _until(run(Phase(request, must_go_on=True)), texts, vocabulary)
        async with aclosing(free) as tokens:
            async for token in tokens:
                written.append(token.id)
                yield token
        left = request.max_tokens - len(written)
        if left <= 0:
            return
        request = replace(request, ids=(*request.ids, *written), max_tokens=left)
    async with aclosing(run(Phase(request, schema))) as tokens:
        async for token in tokens:
            yield token


async def _until(
    phase: AsyncGenerator[Token, None], texts: Sequence[bytes], vocabulary: Vocabulary
) -> AsyncGenerator[Token, None]:
    """The tokens up to the last of ``texts``, which come one behind the other.

    A token that goes beyond it is replaced by the tokens of its beginning.
    """
    tail, awaited = b"", list(texts)
    async with aclosing(phase) as tokens:
        async for token in tokens:
            own = vocabulary.tokens.of(token.id)
            tail += own
            while awaited and (place := tail.find(awaited[0])) >= 0:
                tail = tail[place + len(awaited.pop(0)) :]
            if awaited:
                tail = tail[max(0, len(tail) - len(awaited[0]) + 1) :]
                yield token
                continue
            beginning = own[: len(own) - len(tail)]
            if tail.strip() and beginning:
                for id_ in vocabulary.encode(beginning.decode("utf-8", "replace")):
                    yield Token(id_)
            else:
                yield token
            return

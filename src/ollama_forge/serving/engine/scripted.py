"""An engine that yields token ids from a script, for tests of the layers above engines. Imports no torch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

from ollama_forge.serving.engine.base import EngineError, EngineRequest, Logprob, Token

Script = Callable[[EngineRequest], Sequence[int]] | Sequence[Sequence[int]]


class ScriptedEngine:
    """Yields the ids of a script: a function of the request, or a list of outputs that take turns.

    An id in ``request.end_ids`` ends the output. Log-probabilities are a function of the id; the alternatives are the
    next higher ids.

    Attributes:
        active: number of requests that are running now.
        served: number of requests that were started.
        requests: all requests, in the order of arrival.
    """

    def __init__(
        self,
        script: Script,
        *,
        slots: int = 64,
        context_length: int = 4096,
        vocabulary: int = 1 << 16,
        width: int = 16,
        pause: bool = True,
        fail_after: int | None = None,
    ) -> None:
        """``pause`` lets other tasks run between tokens; after ``fail_after`` tokens an output fails."""
        self.script, self.vocabulary, self.width = script, vocabulary, width
        self.pause, self.fail_after = pause, fail_after
        self._slots, self._context_length = slots, context_length
        self.active = self.served = 0
        self.requests: list[EngineRequest] = []
        self.closed = False

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def context_length(self) -> int:
        return self._context_length

    async def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        script = self.script
        output = script(request) if callable(script) else script[self.served % len(script)]
        self.requests.append(request)
        self.served += 1
        self.active += 1
        try:
            for index, token in enumerate(output):
                if self.closed or token in request.end_ids or index >= request.max_tokens:
                    return
                if index == self.fail_after:
                    raise EngineError("the engine failed")
                if self.pause:
                    await asyncio.sleep(0)
                yield self._step(token, request.top_logprobs)
        finally:
            self.active -= 1

    def _step(self, token: int, top: int | None) -> Token:
        if top is None:
            return Token(token)
        value = -1.0 / (2 + token % 7)
        others = ((token + offset) % self.vocabulary for offset in range(1, top))
        ranked = [Logprob(other, value - index - 1) for index, other in enumerate(others)]
        return Token(token, value, (Logprob(token, value), *ranked) if top else ())

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """A unit vector ``[width]`` for each input, computed from its ids."""
        vectors = []
        for ids in inputs:
            raw = [sum(math.sin((place + 1) * (token + 1)) for token in ids) + 1e-3 for place in range(self.width)]
            norm = math.sqrt(sum(value * value for value in raw))
            vectors.append([value / norm for value in raw])
        return vectors

    def close(self) -> None:
        self.closed = True

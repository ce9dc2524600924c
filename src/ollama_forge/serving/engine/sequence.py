"""A sequence: one request in the scheduler, from its arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.constraint import GrammarCompiler, GrammarMatcher
from ollama_forge.serving.engine.sampler import SamplingState


@dataclass(eq=False)
class Sequence:
    """A request that waits or runs.

    Attributes:
        sink: what the scheduler's ``deliver`` sends the tokens to.
        sampling: the sampling state, from the beginning of the prefill on.
        matcher: the grammar of a constrained request, from the beginning of the prefill on.
        output_ids: ids of the tokens generated so far.
    """

    request: EngineRequest
    sink: Any
    cancelled: bool = False
    sampling: SamplingState | None = None
    matcher: GrammarMatcher | None = None
    output_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Ids of the prompt and of the tokens generated so far."""
        return [*self.request.ids, *self.output_ids]

    @property
    def finished(self) -> bool:
        """Whether the sequence has all of its tokens, or a complete JSON value."""
        full = len(self.output_ids) >= self.request.max_tokens
        return full or (self.matcher is not None and self.matcher.finished)

    def prepare(self, grammars: GrammarCompiler) -> None:
        """Make the sampling state and the grammar.

        Raises:
            EngineError: the request's schema cannot be enforced.
        """
        request = self.request
        self.sampling = SamplingState(request.sampling, request.ids, request.top_logprobs)
        if request.constraint is not None:
            self.matcher = grammars.start(request.constraint)

    def constrain(self) -> None:
        """Set which tokens may come next.

        Raises:
            EngineError: the grammar reached one of its own limits.
        """
        if self.matcher is None or self.sampling is None:
            return
        try:
            self.sampling.allowed = self.matcher.allowed(self.request.end_ids)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"the structured output cannot be continued: {error}") from None

    def append(self, token: Token) -> None:
        """Add a generated token.

        Raises:
            EngineError: the grammar reached one of its own limits.
        """
        assert self.sampling is not None
        if self.matcher is not None:
            self.matcher.add(token.id)
        self.output_ids.append(token.id)
        self.sampling.add(token.id)

"""A sequence: one request in the scheduler, from its arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.constraint import GrammarCompiler, GrammarMatcher
from ollama_forge.serving.engine.json_schema import one_line
from ollama_forge.serving.engine.sampler import SamplingState


@dataclass(eq=False)
class Sequence:
    """A request that waits or runs.

    Attributes:
        sink: what the scheduler's ``deliver`` sends the tokens to.
        sampling: the sampling state.
        matcher: the grammar of a constrained request.
        output_ids: ids of the tokens generated so far.
        cached: number of the prompt's tokens whose state was kept.
        waits_for: the sequence whose prompt begins alike and is being prefilled, so that this one can copy it.
        row_offset: what is added to each id for the runner; see ``LiveEdit.offset``.
    """

    request: EngineRequest
    sink: Any
    sampling: SamplingState
    matcher: GrammarMatcher | None = None
    cancelled: bool = False
    output_ids: list[int] = field(default_factory=list)
    cached: int = 0
    waits_for: Sequence | None = None
    row_offset: int = 0

    @classmethod
    def of(cls, request: EngineRequest, sink: Any, grammars: GrammarCompiler, row_offset: int = 0) -> Sequence:
        """Prepare a sequence for a request. A grammar takes up to seconds: call this outside event loops.

        Raises:
            EngineError: the request's schema cannot be enforced.
        """
        matcher = None if request.constraint is None else grammars.start(request.constraint)
        sampling = SamplingState(request.sampling, request.ids, request.top_logprobs)
        return cls(request, sink, sampling, matcher, row_offset=row_offset)

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        """Row ids of the prompt."""
        return tuple(id_ + self.row_offset for id_ in self.request.ids) if self.row_offset else self.request.ids

    @property
    def last_id(self) -> int:
        """Row id of the last generated token."""
        return self.output_ids[-1] + self.row_offset

    @property
    def ids(self) -> list[int]:
        """Row ids of the prompt and of the tokens generated so far."""
        return [*self.prompt, *(id_ + self.row_offset for id_ in self.output_ids)]

    @property
    def finished(self) -> bool:
        """Whether the sequence has all of its tokens, or a complete JSON value."""
        full = len(self.output_ids) >= self.request.max_tokens
        return full or (self.matcher is not None and self.matcher.finished)

    def constrain(self) -> None:
        """Set which tokens may come next.

        Raises:
            EngineError: the grammar reached one of its own limits.
        """
        if self.matcher is None:
            return
        try:
            self.sampling.allowed = self.matcher.allowed(self.request.end_ids)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"the structured output cannot be continued: {one_line(str(error))}") from None

    def append(self, token: Token) -> None:
        """Add a generated token.

        Raises:
            EngineError: the grammar reached one of its own limits.
        """
        if self.matcher is not None:
            self.matcher.add(token.id)
        self.output_ids.append(token.id)
        self.sampling.add(token.id)

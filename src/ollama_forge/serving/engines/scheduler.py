"""The scheduler: it prefills prompts in chunks between decode steps; a step gives each running request one token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ollama_forge.serving.engines.base import EngineError, Request, Step
from ollama_forge.serving.engines.constraint import Enforced, Grammars
from ollama_forge.serving.engines.runner import Prefill, Runner
from ollama_forge.serving.engines.sampling import Row, draw

GROUP_TOKENS = 512  # maximum for prompts that are prefilled together, padding included


@dataclass(frozen=True)
class Stats:
    """Counters since the engine started.

    Attributes:
        prefills: number of groups of prompts that were prefilled.
        prefilled_tokens: number of prompt tokens that were computed instead of taken from the prefix cache.
        active: number of requests that are being prefilled or decoded now.
    """

    forward_passes: int
    prefills: int
    prefilled_tokens: int
    decoded_tokens: int
    active: int


@dataclass(eq=False)
class Answer:
    """A request that waits or runs.

    Attributes:
        sink: where ``deliver`` sends the tokens.
        row: the sampling state, once the prefill has begun.
        said: ids of the tokens generated so far.
    """

    request: Request
    sink: Any
    cancelled: bool = False
    row: Row | None = None
    enforced: Enforced | None = None
    said: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [*self.request.ids, *self.said]


Deliver = Callable[[Answer, Step | EngineError | None], None]


class Scheduler:
    """Schedules requests on one thread; each ``tick`` does a bounded amount of work.

    Args:
        deliver: called with each token of a request, and at its end with None or an error.
    """

    def __init__(self, runner: Runner, grammars: Grammars, deliver: Deliver) -> None:
        self.runner, self.grammars, self.deliver = runner, grammars, deliver
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.prefills = self.prefilled_tokens = self.decoded_tokens = 0
        self._joining: list[Answer] = []
        self._prefill: Prefill | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._joining)

    @property
    def active(self) -> int:
        return len(self.running) + len(self._joining)

    def submit(self, answer: Answer) -> None:
        self.waiting.append(answer)

    @torch.inference_mode()
    def tick(self) -> None:
        """Drop cancelled requests, then run one chunk of a prefill and one decode step of the running requests."""
        self._drop_cancelled()
        if not self._joining:
            self._begin_prefill()
        if self._joining:
            self._advance_prefill()
        if self.running:
            logits = self.runner.step([answer.said[-1] for answer in self.running])
            self._sample(logits)

    def fail(self, error: EngineError) -> None:
        """Deliver ``error`` to all requests that are being prefilled or decoded; waiting requests keep waiting."""
        failed = [*self.running, *self._joining]
        self.running, self._joining, self._prefill = [], [], None
        self.runner.reset()
        for answer in failed:
            self.deliver(answer, error)

    # -- joining --------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        self.waiting = deque(answer for answer in self.waiting if not answer.cancelled)
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                self._leave(row)
        if self._joining and all(answer.cancelled for answer in self._joining):
            self._joining, self._prefill = [], None

    def _begin_prefill(self) -> None:
        room = self.runner.slots - len(self.running)
        group = self._joining
        while self.waiting and len(group) < room:
            if group and not self._fits(group, self.waiting[0]):
                break
            answer = self.waiting.popleft()
            group.append(answer)  # before anything can fail, so that an error reaches this request
            try:
                self._prepare(answer)
            except EngineError as error:
                self.deliver(group.pop(), error)
                continue
        if group:
            media: Any = group[0].request.media
            self._prefill = self.runner.prefill([answer.request.ids for answer in group], media)

    def _fits(self, group: Sequence[Answer], answer: Answer) -> bool:
        """Whether a prompt can be prefilled with a group: no images, and at most half of the computed tokens wasted."""
        if answer.request.media is not None or group[0].request.media is not None:
            return False
        needed = [self.runner.unknown(other.request.ids) for other in (*group, answer)]
        fed = max(needed) * len(needed)
        return fed <= GROUP_TOKENS and fed <= 2 * sum(needed)

    def _prepare(self, answer: Answer) -> None:
        request = answer.request
        answer.row = Row(request.sampling, request.ids, request.top_logprobs)
        if request.constraint is not None:
            answer.enforced = self.grammars.enforce(request.constraint)

    def _advance_prefill(self) -> None:
        assert self._prefill is not None
        logits = self._prefill.advance()
        if logits is None:
            return
        prefill, self._prefill = self._prefill, None
        self.prefills += 1
        self.prefilled_tokens += prefill.tokens
        first = len(self.running)
        for place in range(len(self._joining)):
            self.runner.join(prefill, place)
            self.running.append(self._joining.pop(0))
        self._sample(logits, first)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def _sample(self, logits: Tensor, first: int = 0) -> None:
        """Sample and deliver a token for each running request from number ``first`` on; remove requests that end."""
        answers = self.running[first:]
        errors: Mapping[int, EngineError] = self._constrain(answers)
        steps = draw(logits, [answer.row for answer in answers if answer.row is not None])
        for place in reversed(range(len(answers))):
            answer = answers[place]
            try:
                if place in errors:
                    raise errors[place]
                ended = answer.cancelled or self._deliver_token(answer, steps[place])
            except EngineError as error:
                self.deliver(answer, error)
                self._leave(first + place)
                continue
            if ended:
                self.deliver(answer, None)
                self._leave(first + place)

    def _constrain(self, answers: Sequence[Answer]) -> dict[int, EngineError]:
        errors = {}
        for place, answer in enumerate(answers):
            if answer.enforced is not None and answer.row is not None:
                try:
                    answer.row.allowed = answer.enforced.allowed(answer.request.ends)
                except (ValueError, RuntimeError) as error:
                    errors[place] = EngineError(f"the structured output cannot be continued: {error}")
        return errors

    def _deliver_token(self, answer: Answer, step: Step) -> bool:
        """Deliver a token; return whether the answer is complete."""
        request = answer.request
        assert answer.row is not None
        if step.id in request.ends:
            return True
        if answer.enforced is not None:
            answer.enforced.add(step.id)
        answer.said.append(step.id)
        answer.row.add(step.id)
        self.decoded_tokens += 1
        self.deliver(answer, step)
        return len(answer.said) >= request.max_tokens or (answer.enforced is not None and answer.enforced.finished)

    def _leave(self, row: int) -> None:
        answer = self.running[row]
        self.runner.leave(row, answer.ids if answer.request.media is None else None)
        self.running[row] = self.running[-1]
        self.running.pop()

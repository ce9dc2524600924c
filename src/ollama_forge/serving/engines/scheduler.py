"""The decode loop: prompts are prefilled piece by piece between steps, every running answer gets a token a step."""

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

GROUP_TOKENS = 512  # that a group of prompts is fed at once, padding included


@dataclass(frozen=True)
class Stats:
    """Counts since the engine began, and how many answers are running.

    Attributes:
        prefills: groups of prompts that were prefilled.
        prefilled_tokens: prompts' tokens that were computed, not taken from what was kept.
    """

    forward_passes: int
    prefills: int
    prefilled_tokens: int
    decoded_tokens: int
    active: int


@dataclass(eq=False)
class Answer:
    """A request that waits or runs, and where its tokens go."""

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
    """Single-threaded; ``tick`` does a bounded piece of work.

    Args:
        deliver: takes each token, an error, and None at an answer's end.
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
        """Drop what was cancelled; run a piece of a prefill and a step of all that run."""
        self._drop_cancelled()
        if not self._joining:
            self._begin_prefill()
        if self._joining:
            self._advance_prefill()
        if self.running:
            logits = self.runner.step([answer.said[-1] for answer in self.running])
            self._hand_out(logits)

    def fail(self, error: EngineError) -> None:
        """End all that runs or is being prefilled; what waits goes on waiting."""
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
            group.append(answer)  # before anything can go wrong, so that an error reaches its reader
            try:
                self._prepare(answer)
            except EngineError as error:
                self.deliver(group.pop(), error)
                continue
        if group:
            media: Any = group[0].request.media
            self._prefill = self.runner.prefill([answer.request.ids for answer in group], media)

    def _fits(self, group: Sequence[Answer], answer: Answer) -> bool:
        """Whether a prompt is of a kind with a group's: little is computed only because another needs it."""
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
        self._hand_out(logits, first)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def _hand_out(self, logits: Tensor, first: int = 0) -> None:
        """Draw a token for each of the running answers from ``first`` on, and drop those that end."""
        answers = self.running[first:]
        errors: Mapping[int, EngineError] = self._constrain(answers)
        steps = draw(logits, [answer.row for answer in answers if answer.row is not None])
        for place in reversed(range(len(answers))):
            answer = answers[place]
            try:
                if place in errors:
                    raise errors[place]
                ended = answer.cancelled or self._say(answer, steps[place])
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
                    errors[place] = EngineError(f"the format can't be gone on with: {error}")
        return errors

    def _say(self, answer: Answer, step: Step) -> bool:
        """Hand a token out; whether the answer is at its end."""
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

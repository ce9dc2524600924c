"""The scheduler: it prefills prompts in chunks between decode steps; a step gives each running sequence one token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.serving.engine.base import EngineError, Token
from ollama_forge.serving.engine.constraint import GrammarCompiler
from ollama_forge.serving.engine.model_runner import ModelRunner, Prefill
from ollama_forge.serving.engine.sampler import sample
from ollama_forge.serving.engine.sequence import Sequence

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


Deliver = Callable[[Sequence, Token | EngineError | None], None]


class Scheduler:
    """Schedules sequences on one thread; each ``tick`` does a bounded amount of work.

    Args:
        deliver: called with each token of a sequence, and at its end with None or an error.
    """

    def __init__(self, runner: ModelRunner, grammars: GrammarCompiler, deliver: Deliver) -> None:
        self.runner, self.grammars, self.deliver = runner, grammars, deliver
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of the runner's rows
        self.prefills = self.prefilled_tokens = self.decoded_tokens = 0
        self._joining: list[Sequence] = []
        self._prefill: Prefill | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._joining)

    @property
    def active(self) -> int:
        return len(self.running) + len(self._joining)

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @torch.inference_mode()
    def tick(self) -> None:
        """Drop cancelled sequences, then run one chunk of a prefill and one decode step of the running sequences."""
        self._drop_cancelled()
        if not self._joining:
            self._begin_prefill()
        if self._joining:
            self._advance_prefill()
        if self.running:
            logits = self.runner.step([sequence.output_ids[-1] for sequence in self.running])
            self._sample(logits)

    def fail(self, error: EngineError) -> None:
        """Deliver ``error`` to all sequences that are being prefilled or decoded; the others keep waiting."""
        failed = [*self.running, *self._joining]
        self.running, self._joining, self._prefill = [], [], None
        self.runner.reset()
        for sequence in failed:
            self.deliver(sequence, error)

    # -- prefill --------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.cancelled)
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                self._leave(row)
        if self._joining and all(sequence.cancelled for sequence in self._joining):
            self._joining, self._prefill = [], None

    def _begin_prefill(self) -> None:
        room = self.runner.slots - len(self.running)
        group = self._joining
        while self.waiting and len(group) < room:
            if group and not self._fits(group, self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            group.append(sequence)  # before anything can fail, so that an error reaches this sequence
            try:
                sequence.prepare(self.grammars)
            except EngineError as error:
                self.deliver(group.pop(), error)
                continue
        if group:
            media: Any = group[0].request.media
            self._prefill = self.runner.prefill([sequence.request.ids for sequence in group], media)

    def _fits(self, group: list[Sequence], sequence: Sequence) -> bool:
        """Whether a prompt can be prefilled with a group: no images, and at most half of the computed tokens wasted."""
        if sequence.request.media is not None or group[0].request.media is not None:
            return False
        needed = [self.runner.uncached(other.request.ids) for other in (*group, sequence)]
        computed = max(needed) * len(needed)
        return computed <= GROUP_TOKENS and computed <= 2 * sum(needed)

    def _advance_prefill(self) -> None:
        assert self._prefill is not None
        logits = self._prefill.advance()
        if logits is None:
            return
        prefill, self._prefill = self._prefill, None
        self.prefills += 1
        self.prefilled_tokens += prefill.tokens
        first = len(self.running)
        for index in range(len(self._joining)):
            self.runner.join(prefill, index)
            self.running.append(self._joining.pop(0))
        self._sample(logits, first)

    # -- decode ---------------------------------------------------------------------------------------------------

    def _sample(self, logits: Tensor, first: int = 0) -> None:
        """Sample and deliver a token for each running sequence from row ``first`` on; remove those that finish."""
        sequences = self.running[first:]
        errors = self._constrain(sequences)
        tokens = sample(logits, [sequence.sampling for sequence in sequences if sequence.sampling is not None])
        for index in reversed(range(len(sequences))):
            sequence = sequences[index]
            try:
                if index in errors:
                    raise errors[index]
                finished = sequence.cancelled or self._deliver_token(sequence, tokens[index])
            except EngineError as error:
                self.deliver(sequence, error)
                self._leave(first + index)
                continue
            if finished:
                self.deliver(sequence, None)
                self._leave(first + index)

    def _constrain(self, sequences: list[Sequence]) -> dict[int, EngineError]:
        """Set each sequence's allowed tokens; the errors of those that cannot be continued, by index."""
        errors = {}
        for index, sequence in enumerate(sequences):
            try:
                sequence.constrain()
            except EngineError as error:
                errors[index] = error
        return errors

    def _deliver_token(self, sequence: Sequence, token: Token) -> bool:
        """Deliver a token; return whether the sequence is finished."""
        if token.id in sequence.request.end_ids:
            return True
        sequence.append(token)
        self.decoded_tokens += 1
        self.deliver(sequence, token)
        return sequence.finished

    def _leave(self, row: int) -> None:
        sequence = self.running[row]
        self.runner.leave(row, sequence.ids if sequence.request.media is None else None)
        self.running[row] = self.running[-1]
        self.running.pop()

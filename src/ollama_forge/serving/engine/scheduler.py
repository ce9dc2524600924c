"""The scheduler: it prefills prompts in chunks between decode steps; a step gives each running sequence one token."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from traceback import format_tb
from typing import Any

import torch
from torch import Tensor

from ollama_forge.models.device import is_out_of_memory, release_memory, upload
from ollama_forge.serving.engine.base import EngineError, Token
from ollama_forge.serving.engine.model_runner import ModelRunner, Prefill
from ollama_forge.serving.engine.prefix_cache import common_prefix
from ollama_forge.serving.engine.sampled import Sampled
from ollama_forge.serving.engine.sampler import sample
from ollama_forge.serving.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)
GROUP_TOKENS = 1024  # maximum for prompts that are prefilled together, padding included
CHUNKS_A_TICK = 2  # of prefills, between two decode steps: the token budget; what is begun below it is done
WORTH_WAITING = 128  # shared tokens for which a prompt waits until another has computed them

Errors = dict[Sequence, EngineError]


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
class _Joining:
    """Sequences whose prompts are being prefilled together.

    Attributes:
        left: number of tokens still to compute.
        errors: the result of ``Scheduler._begin_masks``.
    """

    sequences: list[Sequence]
    prefill: Prefill
    left: int
    errors: Future[Errors] | None


@dataclass(frozen=True)
class _Unread:
    """The tokens of the last step, for all running sequences in their order; the host has not waited for them yet."""

    sampled: Sampled
    offsets: list[int]

    @property
    def row_ids(self) -> Tensor:
        """Row ids ``[rows]`` on the device."""
        ids = self.sampled.ids
        return ids + upload(self.offsets, ids.device) if any(self.offsets) else ids


Deliver = Callable[[Sequence, Token | EngineError | None], None]


class Scheduler:
    """Schedules sequences on one thread; each ``tick`` does a bounded amount of work.

    An error while a prompt is prefilled, constrained or joins ends its sequence alone, and prompts that failed
    together are tried again one by one. Only an error of a decode step, which ``tick`` raises, is everybody's.

    If the runner runs ahead, the host hands out the tokens of a step while the device computes the next one. A sequence
    that ends then has been stepped once too often; that token is dropped.

    Args:
        deliver: called with each token of a sequence, and at its end with None or an error.
    """

    def __init__(self, runner: ModelRunner, deliver: Deliver) -> None:
        self.runner, self.deliver = runner, deliver
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of the runner's rows
        self.prefills = self.prefilled_tokens = self.decoded_tokens = 0
        self._joining: list[_Joining] = []  # oldest first
        self._unread: _Unread | None = None
        self._masks = ThreadPoolExecutor(1, "grammar")

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._joining)

    @property
    def active(self) -> int:
        return len(self.running) + sum(len(group.sequences) for group in self._joining)

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @torch.inference_mode()
    def tick(self) -> None:
        """Drop cancelled sequences, then run some chunks of prefills and one decode step of the running sequences."""
        if self._unread is None or not self._runs_ahead():
            self._hand_out_unread()
            self._drop_cancelled()
            self._begin_prefills()
            self._advance_prefills()
        if self.running and self._runs_ahead():
            self._step_ahead()
            return
        self._hand_out_unread()
        if self.running:
            masks = self._begin_masks(self.running)
            try:
                logits = self.runner.step([sequence.last_id for sequence in self.running])
            finally:
                errors = _result(masks)  # also after an error, so that no thread still uses a grammar
            self._sample(logits, errors)

    def fail(self, error: EngineError) -> None:
        """Deliver ``error`` to all running sequences; prompts that are being prefilled or wait go on."""
        failed, self.running = self.running, []
        self._unread = None
        for sequence in failed:
            self.deliver(sequence, error)
        self.runner.reset()

    def close(self) -> None:
        """Drop all sequences and free the runner's memory."""
        self.running, self._joining, self.waiting, self._unread = [], [], deque(), None
        self._masks.shutdown(wait=False)
        self.runner.reset()

    # -- prefill --------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.cancelled)
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                self._leave(row)
        self._joining = [
            group for group in self._joining if not all(sequence.cancelled for sequence in group.sequences)
        ]

    def _begin_prefills(self) -> None:
        while group := self._next_group():
            self._begin(group)

    def _next_group(self) -> list[Sequence]:
        """Take the waiting sequences that can be prefilled together next, up to the number of free slots."""
        room = self.runner.slots - self.active
        group: list[Sequence] = []
        needed: list[int] = []  # for each of the group, the tokens to compute
        for sequence in list(self.waiting) if room > 0 else ():
            if len(group) == room:
                break
            if self._waits_for_prefix(sequence, group):
                continue
            needed.append(self.runner.uncached(sequence.prompt))
            if group and not self._fits(group, sequence, needed):
                break
            self.waiting.remove(sequence)
            sequence.waits_for = None
            group.append(sequence)
        return group

    def _waits_for_prefix(self, sequence: Sequence, group: list[Sequence]) -> bool:
        """Whether a prompt that is being prefilled computes a long prefix that this sequence can copy soon."""
        if sequence.request.media is not None or not self.runner.reuses:
            return False
        earlier = [*(other for joining in self._joining for other in joining.sequences), *group]
        if sequence.waits_for in earlier:
            return True
        ids = sequence.prompt
        known: int | None = None
        for other in earlier:
            shared = 0 if other.request.media is not None else common_prefix(other.prompt, ids[:-1])
            if shared < WORTH_WAITING:
                continue
            if known is None:
                known = len(ids) - self.runner.uncached(ids)
            if shared - known >= WORTH_WAITING:
                sequence.waits_for = other
                return True
        return False

    def _fits(self, group: list[Sequence], sequence: Sequence, needed: list[int]) -> bool:
        """Whether a prompt can be prefilled with a group: no images, a chunk at most, and at most half of it wasted."""
        if sequence.request.media is not None or group[0].request.media is not None:
            return False
        computed = max(needed) * len(needed)
        return computed <= min(self.runner.chunk, GROUP_TOKENS) and computed <= 2 * sum(needed)

    def _begin(self, group: list[Sequence]) -> None:
        media: Any = group[0].request.media
        try:
            prefill = self.runner.prefill([sequence.prompt for sequence in group], media)
        except Exception as error:
            self._retry_singly(group, error)
            return
        left = sum(len(sequence.prompt) for sequence in group) - sum(prefill.cached)
        self._joining.append(_Joining(group, prefill, left, self._begin_masks(group)))

    def _retry_singly(self, group: list[Sequence], error: Exception) -> None:
        """Begin again with each sequence of a group that failed; if it was one sequence, that gets the error."""
        failed = failure(error)
        if len(group) == 1:
            self.deliver(group[0], failed)
            return
        for sequence in group:
            self._begin([sequence])

    def _advance_prefills(self) -> None:
        """Run chunks until the budget is spent: one of the oldest prefill, then of those with the least left.

        So a long prompt goes on in each tick, and a short one does not wait for it.
        """
        budget = CHUNKS_A_TICK * min(self.runner.chunk, GROUP_TOKENS)
        others = list(self._joining)
        for group in [*others[:1], *sorted(others[1:], key=lambda other: other.left), *others[:1]]:
            if budget > 0 and group in self._joining:
                budget -= self._advance(group)

    def _advance(self, group: _Joining) -> int:
        """Run one chunk of a prefill; return its number of tokens."""
        tokens = min(group.left, self.runner.chunk)
        group.left -= tokens
        try:
            logits = group.prefill.advance()
        except Exception as error:
            self._joining.remove(group)
            _result(group.errors)
            self._retry_singly(group.sequences, error)
            return tokens
        if logits is not None:
            self._joining.remove(group)
            self._join(group, logits)
        return tokens

    def _join(self, group: _Joining, logits: Tensor) -> None:
        """Move prefilled sequences to the decode batch, and sample their first tokens."""
        self.prefills += 1
        for sequence, cached in zip(group.sequences, group.prefill.cached, strict=True):
            sequence.cached = cached
            self.prefilled_tokens += len(sequence.prompt) - cached
        first = len(self.running)
        joined = []
        for index, sequence in enumerate(group.sequences):
            try:
                self.runner.join(group.prefill, index)
            except Exception as error:
                self.deliver(sequence, failure(error))
                continue
            self.running.append(sequence)
            joined.append(index)
        try:
            if joined:
                self._sample(logits if len(joined) == len(logits) else logits[joined], _result(group.errors), first)
        except Exception as error:
            failed = failure(error)
            for row in reversed(range(first, len(self.running))):
                self.deliver(self.running[row], failed)
                self._leave(row)

    # -- decode ---------------------------------------------------------------------------------------------------

    def _begin_masks(self, sequences: list[Sequence]) -> Future[Errors] | None:
        """Find each constrained sequence's allowed tokens in another thread, beside the forward pass."""
        constrained = [sequence for sequence in sequences if sequence.matcher is not None]
        return self._masks.submit(_constrain, constrained) if constrained else None

    def _sample(self, logits: Tensor, errors: Errors, first: int = 0) -> None:
        """Sample and deliver a token for each running sequence from row ``first`` on; remove those that finish."""
        sampled = sample(logits, [sequence.sampling for sequence in self.running[first:]])
        self._hand_out(sampled.read(), errors, first)

    def _hand_out(self, tokens: list[Token], errors: Errors, first: int = 0, ended: Collection[int] = ()) -> None:
        """Deliver the tokens of the running sequences from row ``first`` on, and remove those that finish.

        Args:
            ended: rows that finished a step ago, whose tokens are dropped.
        """
        for row in reversed(range(first, first + len(tokens))):
            if row in ended or self._deliver_to(self.running[row], tokens[row - first], errors):
                self._leave(row)

    def _deliver_to(self, sequence: Sequence, token: Token, errors: Errors) -> bool:
        """Deliver a token, and the end or an error if there is one; return whether the sequence is over."""
        try:
            if sequence in errors:
                raise errors[sequence]
            finished = sequence.cancelled or self._deliver_token(sequence, token)
        except Exception as error:
            self.deliver(sequence, failure(error, quotes=True))
            return True
        if finished:
            self.deliver(sequence, None)
        return finished

    def _deliver_token(self, sequence: Sequence, token: Token) -> bool:
        """Deliver a token; return whether the sequence is finished."""
        if token.id in sequence.request.end_ids:
            return True
        if not sequence.output_ids:
            token = replace(token, cached=sequence.cached)
        sequence.append(token)
        self.decoded_tokens += 1
        self.deliver(sequence, token)
        return sequence.finished

    # -- one step ahead -------------------------------------------------------------------------------------------

    def _runs_ahead(self) -> bool:
        """Whether the next step needs nothing of the last one but the ids that are on the device."""
        if not self.runner.runs_ahead or self._joining or (self.waiting and self.active < self.runner.slots):
            return False
        unread = self._unread is not None
        return all(
            sequence.matcher is None
            and not sequence.sampling.penalised
            and not sequence.cancelled
            and len(sequence.output_ids) + unread < sequence.request.max_tokens
            for sequence in self.running
        )

    def _step_ahead(self) -> None:
        """Begin a step, and hand out the tokens of the one before meanwhile."""
        last, running = self._unread, self.running
        logits = self.runner.step([sequence.last_id for sequence in running] if last is None else last.row_ids)
        sampled = sample(logits, [sequence.sampling for sequence in running])
        self._unread = _Unread(sampled, [sequence.row_offset for sequence in running])
        if last is None:
            return
        tokens = last.sampled.read()
        ended = {row for row, sequence in enumerate(running) if self._deliver_to(sequence, tokens[row], {})}
        if ended:
            self._hand_out_unread(ended)

    def _hand_out_unread(self, ended: Collection[int] = ()) -> None:
        unread, self._unread = self._unread, None
        if unread is not None:
            self._hand_out(unread.sampled.read(), {}, ended=ended)

    def _leave(self, row: int) -> None:
        sequence = self.running[row]
        self.running[row] = self.running[-1]
        self.running.pop()
        self.runner.leave(row, sequence.ids if sequence.request.media is None else None)


def _constrain(sequences: list[Sequence]) -> Errors:
    """Set the allowed tokens of constrained sequences; the errors of those that cannot be continued."""
    errors = {}
    for sequence in sequences:
        try:
            sequence.constrain()
        except Exception as error:
            errors[sequence] = failure(error, quotes=True)
    return errors


def _result(errors: Future[Errors] | None) -> Errors:
    return errors.result() if errors is not None else {}


def failure(error: Exception, *, quotes: bool = False) -> EngineError:
    """The error that the client gets; the details go to the log.

    Args:
        quotes: whether the message of ``error`` may quote the request, so that the log must not have it.
    """
    if isinstance(error, EngineError):
        return error
    if is_out_of_memory(error):
        release_memory()
        return EngineError("the model ran out of memory; use shorter prompts or fewer requests at a time")
    if quotes:
        _LOG.error("a request failed (%s)\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
    else:
        _LOG.error("the model failed", exc_info=error)
    return EngineError(f"the model failed while generating ({type(error).__name__})")

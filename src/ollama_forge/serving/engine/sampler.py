"""Samples the next token of many rows at once.

The order is that of llama.cpp's default chain: penalties, top_k, typical_p, top_p, min_p, temperature, random draw.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ollama_forge.models.device import float64_device
from ollama_forge.serving.engine.base import Logprob, SamplingParams, Token

_UNIFORMS = 32
_LEAST_TEMPERATURE = 1e-6  # lower temperatures decode greedily: logits divided by less would overflow
_MOST_CANDIDATES = 1024  # above this top_k, sorting the whole vocabulary costs as much


class SamplingState:
    """The sampling state of one sequence: its params, random numbers and recent tokens.

    Attributes:
        allowed: mask of the tokens that may come next, bool ``[vocabulary]`` on the CPU; None allows all.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], top_logprobs: int | None = None) -> None:
        self.params = params
        self.top_logprobs = top_logprobs
        self.allowed: Tensor | None = None
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % (1 << 64))
        self._uniforms: list[float] = []
        self.penalised = params.repeat_last_n != 0 and (
            params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        last = params.repeat_last_n if params.repeat_last_n >= 0 else None
        self._recent: deque[int] = deque(maxlen=last)
        self.counts: Counter[int] = Counter()
        if self.penalised:
            for token in islice(prompt, max(0, len(prompt) - last) if last is not None else 0, None):
                self.add(token)

    @property
    def greedy(self) -> bool:
        return self.params.temperature < _LEAST_TEMPERATURE

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return self.greedy and not self.penalised and self.allowed is None

    def add(self, token: int) -> None:
        """Count a token for the penalties."""
        if not self.penalised:
            return
        if len(self._recent) == self._recent.maxlen:
            gone = self._recent[0]
            self.counts[gone] -= 1
            if not self.counts[gone]:
                del self.counts[gone]
        self._recent.append(token)
        self.counts[token] += 1

    def uniform(self) -> float:
        """The sequence's next random number in [0, 1); other rows of the batch do not influence it."""
        if not self._uniforms:
            drawn = torch.rand(_UNIFORMS, generator=self._generator)
            self._uniforms = drawn.tolist()[::-1]
        return self._uniforms.pop()


@dataclass(frozen=True)
class Candidates:
    """The tokens to sample from, likeliest first.

    Attributes:
        ids: token ids ``[rows, candidates]``.
        scores: float32 logits of the same shape, ``-inf`` for tokens that a filter removed.
    """

    ids: Tensor
    scores: Tensor


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Token]:
    """Sample each row's next token from logits ``[rows, vocabulary]``; rows that ask for log-probabilities get them."""
    chosen = (
        logits.argmax(-1).tolist() if all(state.is_argmax for state in states) else _sample_filtered(logits, states)
    )
    tokens = [Token(token) for token in chosen]
    for row, logprob, top in _logprobs(logits, states, chosen):
        tokens[row] = replace(tokens[row], logprob=logprob, top=top)
    return tokens


def _sample_filtered(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    scores = logits
    if any(state.penalised or state.allowed is not None for state in states):
        scores = _penalised(_masked(logits.to(torch.float32, copy=True), states), states)
    chosen = [0] * len(states)
    greedy = [row for row, state in enumerate(states) if state.greedy]
    if greedy:
        picked = scores if len(greedy) == len(states) else scores[greedy]
        for row, token in zip(greedy, picked.argmax(-1).tolist(), strict=True):
            chosen[row] = token
    vocabulary = scores.shape[-1]
    drawn = [row for row, state in enumerate(states) if not state.greedy]
    few = [row for row in drawn if 0 < states[row].params.top_k <= min(_MOST_CANDIDATES, vocabulary)]
    narrow = set(few)
    for group in (few, [row for row in drawn if row not in narrow]):
        if group:
            params = [states[row].params for row in group]
            candidates = filter_logits(scores if len(group) == len(states) else scores[group], params)
            uniforms = [states[row].uniform() for row in group]
            for row, token in zip(group, draw(candidates, params, uniforms), strict=True):
                chosen[row] = token
    return chosen


def _masked(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Set the logits of tokens that are not allowed to ``-inf``, in place."""
    rows = [row for row, state in enumerate(states) if state.allowed is not None]
    if rows:
        allowed = torch.stack([state.allowed for state in states if state.allowed is not None]).to(scores.device)
        scores[rows] = scores[rows].masked_fill(~allowed, float("-inf"))
    return scores


def _penalised(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Penalise recent tokens, in place.

    The repeat penalty divides a positive logit and multiplies a negative one. The presence penalty is subtracted once
    for each token, the frequency penalty once for each occurrence.
    """
    rows, ids, values = [], [], []
    for row, state in enumerate(states):
        if state.penalised and state.counts:
            each = state.params
            rows += [row] * len(state.counts)
            ids += list(state.counts)
            values += [
                (each.repeat_penalty, count * each.frequency_penalty + each.presence_penalty)
                for count in state.counts.values()
            ]
    if ids:
        where = torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device)
        repeat, off = torch.tensor(values, device=scores.device, dtype=scores.dtype).unbind(1)
        old = scores[where]
        scores[where] = torch.where(old > 0, old / repeat, old * repeat) - off
    return scores


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """Filter logits ``[rows, vocabulary]`` by top_k, typical_p, top_p and min_p, each among the tokens left so far."""
    vocabulary, device = logits.shape[-1], logits.device
    counts = [min(each.top_k, vocabulary) if each.top_k > 0 else vocabulary for each in params]
    scores, ids = logits.topk(max(counts), dim=-1)
    scores = scores.float()
    lowest = float("-inf")
    if min(counts) < max(counts):
        ranks = torch.arange(max(counts), device=device)
        scores = scores.masked_fill(ranks >= torch.tensor(counts, device=device).unsqueeze(1), lowest)
    if any(each.typical_p < 1 for each in params):
        scores = scores.masked_fill(_untypical(scores, _column(params, "typical_p", device)), lowest)
    if any(each.top_p < 1 for each in params):
        shares = scores.softmax(-1)
        outside = shares.cumsum(-1) - shares >= _column(params, "top_p", device)  # the token that crosses top_p stays
        scores = scores.masked_fill(outside & _not_the_first(scores), lowest)
    if any(each.min_p > 0 for each in params):
        least = scores.amax(-1, keepdim=True) + _column(params, "min_p", device).clamp(0, 1).log()
        scores = scores.masked_fill(scores < least, lowest)
    return Candidates(ids, scores)


def _column(params: Sequence[SamplingParams], name: str, device: torch.device) -> Tensor:
    return torch.tensor([[float(getattr(each, name))] for each in params], device=device)


def _not_the_first(scores: Tensor) -> Tensor:
    """Mask of all tokens but each row's likeliest."""
    best = scores.argmax(-1, keepdim=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)


def _untypical(scores: Tensor, typical_p: Tensor) -> Tensor:
    """Mask of the tokens outside the typical set.

    The set takes tokens in the order of how close their surprisal is to the entropy, until it reaches the probability
    ``typical_p``.
    """
    logs = scores.log_softmax(-1)
    shares = logs.exp()
    entropy = -(shares * logs.masked_fill(shares == 0, 0.0)).sum(-1, keepdim=True)
    order = (logs + entropy).abs().argsort(stable=True)
    sorted_shares = shares.gather(-1, order)
    late = sorted_shares.cumsum(-1) - sorted_shares >= typical_p
    late[:, 0] = False
    outside = torch.zeros_like(late).scatter_(-1, order, late)
    return outside & (typical_p < 1)


def draw(candidates: Candidates, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Draw one token id per row at the row's temperature; ``uniforms`` has a random number in [0, 1) per row."""
    scores = candidates.scores / _column(params, "temperature", candidates.scores.device)
    scores = scores.to(float64_device(scores.device))
    heights = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    levels = torch.tensor(uniforms, device=scores.device, dtype=torch.float64).unsqueeze(1) * heights[:, -1:]
    picked = torch.searchsorted(heights, levels, right=True).clamp_max(heights.shape[-1] - 1)
    return candidates.ids.gather(-1, picked.to(candidates.ids.device)).squeeze(1).tolist()


def _logprobs(
    logits: Tensor, states: Sequence[SamplingState], chosen: Sequence[int]
) -> list[tuple[int, float, tuple[Logprob, ...]]]:
    """Row, log-probability and alternatives for each row that asks for them, from the raw logits."""
    wanted = [(row, state.top_logprobs) for row, state in enumerate(states) if state.top_logprobs is not None]
    if not wanted:
        return []
    rows = [row for row, _ in wanted]
    logs = logits[rows].float().log_softmax(-1)
    mine = torch.tensor([[chosen[row]] for row in rows], device=logs.device)
    values = logs.gather(-1, mine).squeeze(1).tolist()
    widest = min(max(count for _, count in wanted), logs.shape[-1])
    top_values, top_ids = (part.tolist() for part in logs.topk(widest, dim=-1))
    return [
        (
            row,
            values[index],
            tuple(Logprob(*pair) for pair in zip(top_ids[index][:count], top_values[index][:count], strict=True)),
        )
        for index, (row, count) in enumerate(wanted)
    ]

"""Samples the next token of many rows at once.

The steps have the order of llama.cpp's default chain: penalties, top_k, typical_p, top_p, min_p, temperature, draw.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ollama_forge.models.device import float64_device
from ollama_forge.serving.engines.base import Logprob, Sampling, Step

_UNIFORMS = 32
_COLDEST = 1e-6  # lower temperatures decode greedily: logits divided by less would overflow
_WIDEST = 1024  # above this top_k, sorting the whole vocabulary costs as much


class Row:
    """The sampling state of one sequence: its settings, random numbers and recent tokens.

    Attributes:
        allowed: mask of the tokens that may come next, bool ``[vocabulary]`` on the CPU; None allows all.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], top_logprobs: int | None = None) -> None:
        self.sampling = sampling
        self.top_logprobs = top_logprobs
        self.allowed: Tensor | None = None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % (1 << 64))
        self._uniforms: list[float] = []
        self.penalised = sampling.repeat_last_n != 0 and (
            sampling.repeat_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        last = sampling.repeat_last_n if sampling.repeat_last_n >= 0 else None
        self._recent: deque[int] = deque(maxlen=last)
        self.counts: Counter[int] = Counter()
        if self.penalised:
            for token in islice(prompt, max(0, len(prompt) - last) if last is not None else 0, None):
                self.add(token)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < _COLDEST

    @property
    def plain(self) -> bool:
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
        """The row's next random number in [0, 1); other rows of the batch do not influence it."""
        if not self._uniforms:
            drawn = torch.rand(_UNIFORMS, generator=self._generator)
            self._uniforms = drawn.tolist()[::-1]
        return self._uniforms.pop()


@dataclass(frozen=True)
class Candidates:
    """The tokens to draw from, likeliest first.

    Attributes:
        ids: token ids ``[rows, candidates]``.
        scores: float32 logits of the same shape, ``-inf`` for tokens that a filter removed.
    """

    ids: Tensor
    scores: Tensor


def draw(logits: Tensor, rows: Sequence[Row]) -> list[Step]:
    """Sample each row's next token from logits ``[rows, vocabulary]``; rows that ask for log-probabilities get them."""
    chosen = logits.argmax(-1).tolist() if all(row.plain for row in rows) else _draw_shaped(logits, rows)
    steps = [Step(token) for token in chosen]
    for place, logprob, top in _logprobs(logits, rows, chosen):
        steps[place] = replace(steps[place], logprob=logprob, top=top)
    return steps


def _draw_shaped(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    scores = logits
    if any(row.penalised or row.allowed is not None for row in rows):
        scores = _penalised(_masked(logits.to(torch.float32, copy=True), rows), rows)
    chosen = [0] * len(rows)
    greedy = [place for place, row in enumerate(rows) if row.greedy]
    if greedy:
        picked = scores if len(greedy) == len(rows) else scores[greedy]
        for place, token in zip(greedy, picked.argmax(-1).tolist(), strict=True):
            chosen[place] = token
    vocabulary = scores.shape[-1]
    drawn = [place for place, row in enumerate(rows) if not row.greedy]
    few = [place for place in drawn if 0 < rows[place].sampling.top_k <= min(_WIDEST, vocabulary)]
    narrow = set(few)
    for group in (few, [place for place in drawn if place not in narrow]):
        if group:
            settings = [rows[place].sampling for place in group]
            candidates = shape(scores if len(group) == len(rows) else scores[group], settings)
            uniforms = [rows[place].uniform() for place in group]
            for place, token in zip(group, pick(candidates, settings, uniforms), strict=True):
                chosen[place] = token
    return chosen


def _masked(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Set the logits of tokens that are not allowed to ``-inf``, in place."""
    places = [place for place, row in enumerate(rows) if row.allowed is not None]
    if places:
        allowed = torch.stack([row.allowed for row in rows if row.allowed is not None]).to(scores.device)
        scores[places] = scores[places].masked_fill(~allowed, float("-inf"))
    return scores


def _penalised(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalise recent tokens, in place.

    The repeat penalty divides a positive logit and multiplies a negative one. The presence penalty is subtracted once
    for each token, the frequency penalty once for each occurrence.
    """
    places, ids, values = [], [], []
    for place, row in enumerate(rows):
        if row.penalised and row.counts:
            setting = row.sampling
            places += [place] * len(row.counts)
            ids += list(row.counts)
            values += [
                (setting.repeat_penalty, count * setting.frequency_penalty + setting.presence_penalty)
                for count in row.counts.values()
            ]
    if ids:
        where = torch.tensor(places, device=scores.device), torch.tensor(ids, device=scores.device)
        repeat, off = torch.tensor(values, device=scores.device, dtype=scores.dtype).unbind(1)
        old = scores[where]
        scores[where] = torch.where(old > 0, old / repeat, old * repeat) - off
    return scores


def shape(logits: Tensor, settings: Sequence[Sampling]) -> Candidates:
    """Filter logits ``[rows, vocabulary]`` by top_k, typical_p, top_p and min_p, each among the tokens left so far."""
    vocabulary, device = logits.shape[-1], logits.device
    counts = [min(setting.top_k, vocabulary) if setting.top_k > 0 else vocabulary for setting in settings]
    scores, ids = logits.topk(max(counts), dim=-1)
    scores = scores.float()
    lowest = float("-inf")
    if min(counts) < max(counts):
        ranks = torch.arange(max(counts), device=device)
        scores = scores.masked_fill(ranks >= torch.tensor(counts, device=device).unsqueeze(1), lowest)
    if any(setting.typical_p < 1 for setting in settings):
        scores = scores.masked_fill(_untypical(scores, _column(settings, "typical_p", device)), lowest)
    if any(setting.top_p < 1 for setting in settings):
        shares = scores.softmax(-1)
        outside = shares.cumsum(-1) - shares >= _column(settings, "top_p", device)  # the token that crosses top_p stays
        scores = scores.masked_fill(outside & _not_the_first(scores), lowest)
    if any(setting.min_p > 0 for setting in settings):
        least = scores.amax(-1, keepdim=True) + _column(settings, "min_p", device).clamp(0, 1).log()
        scores = scores.masked_fill(scores < least, lowest)
    return Candidates(ids, scores)


def _column(settings: Sequence[Sampling], name: str, device: torch.device) -> Tensor:
    return torch.tensor([[float(getattr(setting, name))] for setting in settings], device=device)


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


def pick(candidates: Candidates, settings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """Draw one token id per row at the row's temperature; ``uniforms`` has a random number in [0, 1) per row."""
    scores = candidates.scores / _column(settings, "temperature", candidates.scores.device)
    scores = scores.to(float64_device(scores.device))
    heights = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    levels = torch.tensor(uniforms, device=scores.device, dtype=torch.float64).unsqueeze(1) * heights[:, -1:]
    places = torch.searchsorted(heights, levels, right=True).clamp_max(heights.shape[-1] - 1)
    return candidates.ids.gather(-1, places.to(candidates.ids.device)).squeeze(1).tolist()


def _logprobs(
    logits: Tensor, rows: Sequence[Row], chosen: Sequence[int]
) -> list[tuple[int, float, tuple[Logprob, ...]]]:
    """Row, log-probability and alternatives for each row that asks for them, from the raw logits."""
    asked = [(place, row.top_logprobs) for place, row in enumerate(rows) if row.top_logprobs is not None]
    if not asked:
        return []
    places = [place for place, _ in asked]
    logs = logits[places].float().log_softmax(-1)
    mine = torch.tensor([[chosen[place]] for place in places], device=logs.device)
    values = logs.gather(-1, mine).squeeze(1).tolist()
    widest = min(max(count for _, count in asked), logs.shape[-1])
    top_values, top_ids = (part.tolist() for part in logs.topk(widest, dim=-1))
    return [
        (
            place,
            values[index],
            tuple(Logprob(*pair) for pair in zip(top_ids[index][:count], top_values[index][:count], strict=True)),
        )
        for index, (place, count) in enumerate(asked)
    ]

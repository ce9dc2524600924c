"""Samples the next token of many rows at once.

The order is that of llama.cpp's default chain: penalties, top_k, typical_p, top_p, min_p, temperature, random draw.

Sorting a large vocabulary costs more than a decode step, so no row is sorted much further than its filters need: not at
all without top_k, typical_p and top_p, else to the ``_MOST_CANDIDATES`` likeliest tokens, to eight times as many where
those do not decide the filters, and so on; all of it only where that is most of the vocabulary.
What a row gets does not depend on the other rows.

Nothing here waits for the device: what is sampled stays there until ``Sampled.read``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor, nn

from ollama_forge.models.device import float64_device, upload
from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.engine.sampled import Logprobs, Sampled

_UNIFORMS = 32
_LEAST_TEMPERATURE = 1e-6  # lower temperatures decode greedily: logits divided by less would overflow
_MOST_CANDIDATES = 1024
_GROWTH = 8  # how many times as many candidates are taken where the last ones did not decide
_BLOCK = 512  # ids whose weights are summed before a token among them is drawn
_KEPT_COLUMNS = 256  # settings of rows that are kept on the device, as they are the same from step to step


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


DrawRows = Callable[[Tensor, Sequence[SamplingParams], Sequence[float]], Tensor]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Sample each row's next token from logits ``[rows, vocabulary]``; rows that ask for log-probabilities get them."""
    chosen = _likeliest(logits) if all(state.is_argmax for state in states) else _sample_filtered(logits, states)
    return Sampled(chosen, _logprobs(logits, states, chosen))


def _likeliest(scores: Tensor) -> Tensor:
    """The first of the likeliest ids ``[rows]``; on a CPU, ``argmax`` takes four times as long in bfloat16."""
    return scores.max(-1).indices if scores.device.type == "cpu" else scores.argmax(-1)


def _sample_filtered(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    scores = logits
    if any(state.penalised or state.allowed is not None for state in states):
        scores = _penalised(_masked(logits.to(torch.float32, copy=True), states), states)
    greedy = [row for row, state in enumerate(states) if state.greedy]
    parts = [(greedy, _likeliest(_rows(scores, greedy)))] if greedy else []
    kinds = _by_order([None if state.greedy else state.params for state in states], scores)
    for draw_rows, rows in kinds:
        params = [states[row].params for row in rows]
        uniforms = [states[row].uniform() for row in rows]
        parts.append((rows, draw_rows(_rows(scores, rows), params, uniforms)))
    return _joined(parts)


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of ``values``, in ascending order."""
    return values if len(rows) == len(values) else values[_numbers(tuple(rows), values.device)]


def _joined(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """The values ``[rows]`` of parts that are given with the numbers of their rows."""
    if len(parts) == 1:
        return parts[0][1]
    rows = [row for numbers, _ in parts for row in numbers]
    joined = torch.cat([values for _, values in parts])
    places = sorted(range(len(rows)), key=rows.__getitem__)
    return joined[_numbers(tuple(places), joined.device)]


@lru_cache(_KEPT_COLUMNS)
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(values, device, torch.long)


@lru_cache(_KEPT_COLUMNS)
def _floats(values: tuple[float, ...], device: torch.device) -> Tensor:
    return upload(values, device, torch.float32)


def _by_order(params: Sequence[SamplingParams | None], scores: Tensor) -> Iterator[tuple[DrawRows, list[int]]]:
    """The rows to draw, by how much of the vocabulary has to be sorted for them.

    A GPU sorts all of it where a filter needs more than ``top_k`` tokens: to see how far it has to sort, the host would
    have to wait.
    """
    cautious = scores.shape[-1] >= 2 * _MOST_CANDIDATES and scores.device.type != "cuda"
    rows: dict[DrawRows, list[int]] = {_draw_sorted: [], _draw_among_likeliest: [], _draw_unsorted: []}
    for row, each in enumerate(params):
        if each is None:
            continue
        if each.top_k <= 0 and each.top_p >= 1 and each.typical_p >= 1:
            rows[_draw_unsorted].append(row)
        elif each.top_k <= 0 and cautious:
            rows[_draw_among_likeliest].append(row)
        else:
            rows[_draw_sorted].append(row)
    return ((draw_rows, numbers) for draw_rows, numbers in rows.items() if numbers)


def _draw_sorted(scores: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Draw rows whose top_k likeliest tokens, or whole vocabulary, is sorted; small and large top_k apart."""
    parts = []
    few = [row for row, each in enumerate(params) if 0 < each.top_k <= _MOST_CANDIDATES]
    for rows in (few, [row for row in range(len(params)) if row not in few]):
        if rows:
            mine = [params[row] for row in rows]
            candidates = filter_logits(_rows(scores, rows), mine)
            parts.append((rows, draw(candidates, mine, [uniforms[row] for row in rows])))
    return _joined(parts)


def _draw_among_likeliest(scores: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Draw rows without top_k: among the likeliest tokens, and among more of them where those do not decide."""
    parts: list[tuple[list[int], Tensor]] = []
    left = list(range(len(params)))  # the rows that are not decided
    whole = Whole.of(scores, entropy=any(each.typical_p < 1 for each in params))
    count = _MOST_CANDIDATES
    while left and 2 * count <= scores.shape[-1]:
        likeliest = _rows(scores, left).topk(count, dim=-1)
        mine, share = [params[row] for row in left], whole.of_rows(left)
        candidates = Candidates(likeliest.indices, likeliest.values.float())
        decided, needed = _decided(candidates.scores, mine, share)
        picked = draw(_filter(candidates, mine, share), mine, [uniforms[row] for row in left])
        done = [place for place, is_decided in enumerate(decided) if is_decided]
        if done:
            parts.append(([left[place] for place in done], _rows(picked, done)))
        least = min((most for most, is_decided in zip(needed, decided, strict=True) if not is_decided), default=0.0)
        left = [row for row, is_decided in zip(left, decided, strict=True) if not is_decided]
        count *= _GROWTH
        while count < least and 2 * count <= scores.shape[-1]:  # so many candidates would decide no row
            count *= _GROWTH
    if left:
        mine, levels = [params[row] for row in left], [uniforms[row] for row in left]
        parts.append((left, _draw_sorted(_rows(scores, left), mine, levels)))
    return _joined(parts)


def _decided(scores: Tensor, params: Sequence[SamplingParams], whole: Whole) -> tuple[list[bool], list[float]]:
    """Whether no token beyond the likeliest ones (their logits are ``scores``) passes the filters of each row.

    Returns:
        That, and how many candidates a row needs at least, as those beyond are no likelier than the last one here.
    """
    logs = scores - whole.total
    shares = logs.exp()
    covered = shares.sum(-1, keepdim=True)
    target = _column(params, "top_p", scores.device)
    decided = covered >= target
    if whole.entropy is not None:
        # the last token here is less likely than typical, so the tokens beyond it are still further from typical
        nearer = (logs + whole.entropy).abs() < -(logs[:, -1:] + whole.entropy)
        typical = _column(params, "typical_p", scores.device)
        decided = torch.where(typical < 1, (shares * nearer).sum(-1, keepdim=True) >= typical, decided)
        target = torch.where(typical < 1, typical, target)
    needed = scores.shape[-1] + (target - covered) / shares[:, -1:]
    flags: list[bool] = decided.squeeze(1).tolist()
    counts: list[float] = needed.squeeze(1).tolist()
    return flags, counts


def _draw_unsorted(scores: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Draw rows that no filter but min_p applies to: first a block of ids, then one of its ids."""
    scores = scores.float()
    best = scores.amax(-1, keepdim=True)
    weights = ((scores - best) / _column(params, "temperature", scores.device)).exp()
    if any(each.min_p > 0 for each in params):
        least = best + _column(params, "min_p", scores.device).clamp(0, 1).log()
        weights = weights.masked_fill(scores < least, 0.0)
    weights = nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).view(len(params), -1, _BLOCK)
    precise = float64_device(weights.device)
    blocks = weights.sum(-1).to(precise, torch.float64)
    heights = blocks.cumsum(-1)
    levels = upload(uniforms, precise, torch.float64).unsqueeze(1) * heights[:, -1:]
    block = torch.searchsorted(heights, levels, right=True).clamp_max(heights.shape[-1] - 1)
    rows = torch.arange(len(params), device=weights.device)
    inner = weights[rows, block.squeeze(1).to(weights.device)].to(precise, torch.float64).cumsum(-1)
    levels -= heights.gather(-1, block) - blocks.gather(-1, block)
    last = (inner < inner[:, -1:]).sum(-1, keepdim=True)  # rounding must not lead beyond the last id with a weight
    place = torch.minimum(torch.searchsorted(inner, levels, right=True), last)
    return (block * _BLOCK + place).squeeze(1).to(scores.device)


def _masked(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Set the logits of tokens that are not allowed to ``-inf``, in place."""
    rows = [row for row, state in enumerate(states) if state.allowed is not None]
    if rows:
        allowed = upload(torch.stack([state.allowed for state in states if state.allowed is not None]), scores.device)
        where = _numbers(tuple(rows), scores.device)
        scores[where] = scores[where].masked_fill(~allowed, float("-inf"))
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
        where = tuple(upload([rows, ids], scores.device).unbind())
        repeat, off = upload(values, scores.device, scores.dtype).unbind(1)
        old = scores[where]
        scores[where] = torch.where(old > 0, old / repeat, old * repeat) - off
    return scores


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """Filter logits ``[rows, vocabulary]`` by top_k, typical_p, top_p and min_p, each among the tokens left so far."""
    vocabulary = logits.shape[-1]
    counts = [min(each.top_k, vocabulary) if each.top_k > 0 else vocabulary for each in params]
    scores, ids = logits.topk(max(counts), dim=-1)
    scores = scores.float()
    if min(counts) < max(counts):
        ranks = torch.arange(max(counts), device=logits.device)
        rows_counts = _numbers(tuple(counts), logits.device).unsqueeze(1)
        scores = scores.masked_fill(ranks >= rows_counts, float("-inf"))
    return _filter(Candidates(ids, scores), params)


@dataclass(frozen=True)
class Whole:
    """What the shares of some tokens are relative to, where they are not all of the tokens.

    Attributes:
        total: log of the sum of all exponentiated logits ``[rows, 1]``.
        entropy: entropy of all tokens in nats ``[rows, 1]``; None: not needed.
    """

    total: Tensor
    entropy: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, *, entropy: bool) -> Whole:
        logits = logits.float()
        total = logits.logsumexp(-1, keepdim=True)
        return cls(total, _entropy(logits - total) if entropy else None)

    def of_rows(self, rows: Sequence[int]) -> Whole:
        return Whole(self.total[rows], None if self.entropy is None else self.entropy[rows])


def _filter(candidates: Candidates, params: Sequence[SamplingParams], whole: Whole | None = None) -> Candidates:
    """Filter by typical_p, top_p and min_p; ``whole`` is given if there are tokens beyond the candidates."""
    scores, device, lowest = candidates.scores, candidates.scores.device, float("-inf")
    if any(each.typical_p < 1 for each in params):
        scores = scores.masked_fill(_untypical(scores, _column(params, "typical_p", device), whole), lowest)
    if any(each.top_p < 1 for each in params):
        total = scores.logsumexp(-1, keepdim=True)
        if whole is not None:
            total = torch.where(_column(params, "typical_p", device) < 1, total, whole.total)
        shares = (scores - total).exp()
        outside = shares.cumsum(-1) - shares >= _column(params, "top_p", device)  # the token that crosses top_p stays
        scores = scores.masked_fill(outside & _not_the_first(scores), lowest)
    if any(each.min_p > 0 for each in params):
        least = scores.amax(-1, keepdim=True) + _column(params, "min_p", device).clamp(0, 1).log()
        scores = scores.masked_fill(scores < least, lowest)
    return Candidates(candidates.ids, scores)


def _column(params: Sequence[SamplingParams], name: str, device: torch.device) -> Tensor:
    return _floats(tuple(float(getattr(each, name)) for each in params), device).unsqueeze(1)


def _not_the_first(scores: Tensor) -> Tensor:
    """Mask of all tokens but each row's likeliest."""
    best = scores.argmax(-1, keepdim=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)


def _untypical(scores: Tensor, typical_p: Tensor, whole: Whole | None) -> Tensor:
    """Mask of the tokens outside the typical set.

    The set takes tokens in the order of how close their surprisal is to the entropy, until it reaches the probability
    ``typical_p``.
    """
    logs = scores.log_softmax(-1) if whole is None else scores - whole.total
    shares = logs.exp()
    entropy = _entropy(logs) if whole is None or whole.entropy is None else whole.entropy
    order = (logs + entropy).abs().argsort(stable=True)
    sorted_shares = shares.gather(-1, order)
    late = sorted_shares.cumsum(-1) - sorted_shares >= typical_p
    late[:, 0] = False
    outside = torch.zeros_like(late).scatter_(-1, order, late)
    return outside & (typical_p < 1)


def _entropy(logs: Tensor) -> Tensor:
    """Entropy in nats ``[rows, 1]`` of log-probabilities ``[rows, tokens]``."""
    return -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0.0)).sum(-1, keepdim=True)


def draw(candidates: Candidates, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Draw a token id per row, ``[rows]``, at its temperature; ``uniforms`` has a random number in [0, 1) per row."""
    scores = candidates.scores / _column(params, "temperature", candidates.scores.device)
    scores = scores.to(float64_device(scores.device))
    heights = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    levels = upload(uniforms, scores.device, torch.float64).unsqueeze(1) * heights[:, -1:]
    picked = torch.searchsorted(heights, levels, right=True).clamp_max(heights.shape[-1] - 1)
    return candidates.ids.gather(-1, picked.to(candidates.ids.device)).squeeze(1)


def _logprobs(logits: Tensor, states: Sequence[SamplingState], chosen: Tensor) -> Logprobs | None:
    """Log-probabilities of the chosen tokens ``[rows]`` and of their alternatives, from the raw logits."""
    wanted = [(row, state.top_logprobs) for row, state in enumerate(states) if state.top_logprobs is not None]
    if not wanted:
        return None
    rows = [row for row, _ in wanted]
    scores = _rows(logits, rows).float()
    total = scores.logsumexp(-1, keepdim=True)
    values = (scores.gather(-1, _rows(chosen, rows).unsqueeze(1)) - total).squeeze(1)
    top = scores.topk(min(max(count for _, count in wanted), scores.shape[-1]), dim=-1)
    return Logprobs(wanted, (values, top.values - total, top.indices))

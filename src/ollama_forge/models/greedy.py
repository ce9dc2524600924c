"""Greedy decoding in batches. The prompts' common prefix is cached; finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from ollama_forge.models.batch_support import BatchSupport
from ollama_forge.models.batching import by_length, pad_left, shared_prefix
from ollama_forge.models.protocol import Decided, ForwardModel, ModelCopies
from ollama_forge.text.tokenizer import Ids

_COMPACT_SHARE = 0.75  # drop finished rows when at most this share of the batch is unfinished


@torch.inference_mode()
def answer(
    model: ForwardModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    *,
    support: BatchSupport,
    decided: Decided | None = None,
    progress: Callable[[int], None] | None = None,
    copies: ModelCopies | None = None,
) -> list[Ids]:
    """``AnsweringModel.answer`` for a model in memory, or for copies of it, with the same batches."""
    out: list[Ids] = [[] for _ in prompts]
    if not prompts:
        return out
    length = _usable_prefix(model, prompts, max_new_tokens) if support.shares_prefix else 0

    def keep(rows: list[int], answers: list[Ids]) -> None:
        for row, ids in zip(rows, answers, strict=True):
            out[row] = ids
        if progress:
            progress(len(rows))

    def answer_all() -> None:
        groups = list(by_length(prompts, model.batch_size, most_tokens=model.batch_tokens, pads=support.pads))
        batches = [
            _Batch([prompts[row] for row in rows], length, max_new_tokens, decided, support.caches) for rows in groups
        ]
        if copies is not None:
            for rows, answers in zip(groups, copies.map(_answer_batch, batches), strict=True):
                keep(rows, answers)
            return

        def work(rows: list[int], batch: _Batch) -> None:
            keep(rows, _answer_batch(model, batch))

        works = [partial(work, rows, batch) for rows, batch in zip(groups, batches, strict=True)]
        tokens = [len(rows) * (len(prompts[rows[0]]) + max_new_tokens) for rows in groups]
        for _ in model.in_step(works, tokens, caches=support.caches):
            pass

    model.retry_smaller(answer_all)
    return out


@dataclass(frozen=True)
class _Batch:
    """Prompts that are answered together.

    Attributes:
        prefix: length of the common prefix to cache.
        caches: whether a text can be continued from its cache.
    """

    prompts: list[Ids]
    prefix: int
    max_new_tokens: int
    decided: Decided | None
    caches: bool


@torch.inference_mode()
def _answer_batch(model: ForwardModel, batch: _Batch) -> list[Ids]:
    decoder = _Decoder(model, batch.prompts, batch.prefix, caches=batch.caches)
    return decoder.run(batch.max_new_tokens, batch.decided)


def _usable_prefix(model: ForwardModel, prompts: Sequence[Ids], max_new_tokens: int) -> int:
    """Length of the common prefix to cache; 0 if the prompts exceed a sliding window, whose cache drops tokens."""
    config = model.module.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(config, "sliding_window", None)
    if window and max(map(len, prompts)) + max_new_tokens >= window:
        return 0
    return shared_prefix(prompts) if len(prompts) > 1 else 0


def _max_answer(model: ForwardModel, length: int) -> float:
    """Maximum answer length for a prompt of ``length`` tokens; infinite without learned positions."""
    positions = model.tokenizer.positions
    return inf if positions is None else positions - length + 1  # the last token of an answer needs no position


class _Decoder:
    """Decodes one batch; holds its tokens, attention mask, key-value cache and the logits of the last position."""

    def __init__(self, model: ForwardModel, prompts: Sequence[Ids], prefix: int, *, caches: bool) -> None:
        self.model, self.caches = model, caches
        self.ids, mask = pad_left([prompt[prefix:] for prompt in prompts], model.tokenizer.pad_id, model.device)
        self.cache: Any = None
        if prefix:
            start = torch.tensor([prompts[0][:prefix]], device=model.device)
            self.cache = model.forward(input_ids=start, use_cache=True).cache
            self.cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
            mask = torch.cat([mask.new_ones(len(prompts), prefix), mask], dim=1)
        self.mask = mask
        self.room = [_max_answer(model, len(prompt)) for prompt in prompts]
        self._forward(self.ids, (mask.cumsum(-1) - 1).clamp_min(0)[:, prefix:])

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        if self.caches:
            result = self.model.forward(**inputs, cache=self.cache, use_cache=True)
            self.cache = result.cache
        else:
            result = self.model.forward(**inputs, use_cache=False)
        self.logits = result.logits[:, -1]

    def run(self, max_new_tokens: int, decided: Decided | None) -> list[Ids]:
        """Decode until every row is finished or has ``max_new_tokens`` tokens."""
        out: list[Ids] = [[] for _ in range(len(self.mask))]
        live = list(range(len(out)))  # the row of the cache at place i answers prompt live[i]
        ends = set(self.model.tokenizer.end_ids)
        finished: set[int] = set()
        for step in range(max_new_tokens):
            chosen = self.logits.argmax(-1)
            for place, token in enumerate(chosen.tolist()):
                row = live[place]
                if row in finished:
                    continue
                if token in ends:
                    finished.add(row)
                    continue
                out[row].append(token)
                if len(out[row]) >= self.room[row] or (decided is not None and decided(out[row])):
                    finished.add(row)
            going = [place for place, row in enumerate(live) if row not in finished]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) <= _COMPACT_SHARE * len(live):
                self._select_rows(going)
                chosen, live = chosen[going], [live[place] for place in going]
            self._append(chosen)
        return out

    def _select_rows(self, places: list[int]) -> None:
        index = torch.tensor(places, device=self.mask.device)
        if self.caches:
            self.cache.reorder_cache(index)
        self.ids, self.mask = self.ids[index], self.mask[index]

    def _append(self, chosen: Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if not self.caches:
            self.ids = torch.cat([self.ids, chosen.unsqueeze(1)], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        if self.model.tokenizer.positions is not None:  # finished rows may continue until they leave the batch
            positions = positions.clamp_max(self.model.tokenizer.positions - 1)
        if self.caches:
            self._forward(chosen.unsqueeze(1), positions[:, -1:])
        else:
            self._forward(self.ids, positions)

"""Continuous batching: sequences of different lengths share one KV cache, and join and leave between decode steps.

The rows are right-aligned. Transformers models support this layout, because ``generate`` pads on the left: their
masks, sliding windows and position biases work unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollama_forge.serving.engine.kv_cache import KVCache
from ollama_forge.serving.engine.model_runner import Forward, Media, on_device
from ollama_forge.serving.engine.prefix_cache import PrefixCache

_SPARE_COLUMNS = 64
_CHUNK = {"cpu": 512}
_CHUNK_ON_DEVICE = 2048


class BatchedPrefill:
    """Prefills prompts in a cache of their own, right-aligned.

    A single prompt runs in chunks after its cached prefix. Several prompts run in one pass, which computes the last
    ``new_tokens`` tokens of each; ``new_tokens`` is the largest number of uncached tokens among them.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        chunk: int,
        media: Media,
    ) -> None:
        self.forward, self.cache, self.chunk = forward, cache, chunk
        self.media = on_device(media, forward.model)
        self.width = max(map(len, prompts))
        self.starts = [self.width - len(prompt) for prompt in prompts]
        self.tokens = sum(min(len(prompt), new_tokens) for prompt in prompts)
        cache.span.end = self.width - new_tokens
        pad, device = forward.model.tokenizer.pad_id, forward.device
        self._ids = torch.tensor(
            [[pad] * start + list(prompt) for start, prompt in zip(self.starts, prompts, strict=True)], device=device
        )
        columns = torch.arange(self.width, device=device)
        starts = torch.tensor(self.starts, device=device).unsqueeze(1)
        self._positions = (columns - starts).clamp_min(0)
        self._mask = (columns >= starts).long() if any(self.starts) else None

    def advance(self) -> Tensor | None:
        span = self.cache.span
        end = self.width if len(self.starts) > 1 or self.media else min(self.width, span.end + self.chunk)
        inputs = dict(self.media)
        if self._mask is not None:
            inputs["attention_mask"] = self._mask
        logits, _ = self.forward(
            self._ids[:, span.end : end], self.cache, position_ids=self._positions[:, span.end : end], **inputs
        )
        span.end = end
        return logits if end == self.width else None


class BatchedRunner:
    """Decodes up to ``slots`` sequences at once.

    Args:
        has_kv: for each layer, whether it stores keys and values (``kv_cache.layers_with_kv``).
        nbytes: maximum size of the prefix cache.
    """

    def __init__(self, forward: Forward, has_kv: Sequence[bool], slots: int, nbytes: int) -> None:
        self.forward, self.has_kv, self.slots = forward, has_kv, slots
        self.prefixes: PrefixCache[KVCache] = PrefixCache(2 * slots, nbytes)
        self.chunk = _CHUNK.get(forward.device.type, _CHUNK_ON_DEVICE)
        self.cache: KVCache | None = None
        self.starts: list[int] = []
        self._changed = True
        self._mask: Tensor | None = None
        self._positions = torch.empty(0, 1, dtype=torch.long)

    # -- prefill --------------------------------------------------------------------------------------------------

    def uncached(self, prompt: Sequence[int]) -> int:
        found = self.prefixes.match(prompt)
        return len(prompt) - (found[1] if found is not None else 0)

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> BatchedPrefill:
        cache = KVCache(self.has_kv, len(prompts), max(map(len, prompts)))
        found = [self.prefixes.match(prompt) if media is None else None for prompt in prompts]
        new_tokens = max(
            len(prompt) - (match[1] if match is not None else 0) for prompt, match in zip(prompts, found, strict=True)
        )
        prefill = BatchedPrefill(self.forward, cache, prompts, new_tokens, self.chunk, media)
        for row, match in enumerate(found):
            length = cache.span.end - prefill.starts[row]
            if match is not None and length > 0:
                cache.copy_row(match[0], 0, 0, row, prefill.starts[row], length)
        return prefill

    def join(self, prefill: BatchedPrefill, index: int) -> None:
        length = prefill.width - prefill.starts[index]
        row = len(self.starts)
        if self.cache is None:
            self.cache = KVCache(self.has_kv, 1, length + max(_SPARE_COLUMNS, length // 2))
            self.cache.span.start = self.cache.span.end = length
        self._make_room(row + 1, length)
        end = self.cache.span.end
        self.cache.copy_row(prefill.cache, index, prefill.starts[index], row, end - length, length)
        self.starts.append(end - length)
        self.cache.span.rows = row + 1
        self._update_start()

    def _make_room(self, rows: int, length: int) -> None:
        """Ensure room for ``rows`` rows, for ``length`` columns before the common end, and for one column after it."""
        assert self.cache is not None
        span = self.cache.span
        row_room, room = span.row_room, span.column_room
        if rows <= row_room and length <= span.end < room:
            return
        while row_room < rows:
            row_room = min(2 * row_room, self.slots)
        width = span.end - span.start
        needed = max(width, length)
        if 4 * needed > 3 * room:  # moving the rows to the front would make room for few steps
            room = needed + max(_SPARE_COLUMNS, needed // 2)
        shift = needed - width - span.start
        self.cache.relocate(needed - width, row_room, room)
        self.starts = [start + shift for start in self.starts]
        self._changed = True

    def _update_start(self) -> None:
        """Set the first used column after a row joined or left."""
        assert self.cache is not None
        self.cache.span.start = min(self.starts)
        self._changed = True

    # -- decoding -------------------------------------------------------------------------------------------------

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self.cache is not None
        self._make_room(len(self.starts), 0)
        if self._changed:
            self._build_inputs()
        span = self.cache.span
        inputs = {}
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, span.start : span.end + 1]
        ids = torch.tensor(tokens, device=self.forward.device).unsqueeze(1)
        logits, _ = self.forward(ids, self.cache, position_ids=self._positions, **inputs)
        span.end += 1
        self._positions = self._positions + 1
        return logits

    def _build_inputs(self) -> None:
        """Build the mask of all allocated columns, and the next positions; valid until rows join, leave or move."""
        assert self.cache is not None
        device, span = self.forward.device, self.cache.span
        starts = torch.tensor(self.starts, device=device).unsqueeze(1)
        ragged = any(start != span.start for start in self.starts)
        columns = torch.arange(span.column_room, device=device)
        self._mask = (columns >= starts).long() if ragged else None
        self._positions = span.end - starts
        self._changed = False

    # -- leaving --------------------------------------------------------------------------------------------------

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        assert self.cache is not None
        span, last = self.cache.span, len(self.starts) - 1
        if ids is not None:
            length = span.end - self.starts[row]
            kept = KVCache(self.has_kv, 1, length)
            kept.copy_row(self.cache, row, self.starts[row], 0, 0, length)
            kept.span.end = length
            self.prefixes.add(ids[:length], kept, kept.nbytes)
        if row != last:
            start = self.starts[last]
            self.cache.copy_row(self.cache, last, start, row, start, span.end - start)
            self.starts[row] = start
        self.starts.pop()
        span.rows = last
        if self.starts:
            self._update_start()
        else:  # frees the memory that a long prompt or many rows took
            self.cache = None

    def reset(self) -> None:
        self.cache, self.starts = None, []
        self.prefixes.clear()

"""Rows of similar length that share one KV cache; each of them pays for the longest of its group, not of the batch.

The rows are right-aligned. Transformers models support this layout, because ``generate`` pads on the left: their
masks, sliding windows and position biases work unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.serving.engine.kv_cache import KVCache

_SPARE_COLUMNS = 64


@dataclass(eq=False)
class Row:
    """A running sequence.

    Attributes:
        prompt: the prompt, whose keys and values later prompts may copy; empty for one with images.
        offset: what is added to the positions of its next tokens, because of its images.
    """

    prompt: tuple[int, ...]
    group: RowGroup
    offset: int = 0


@dataclass(frozen=True)
class CachedPrefix:
    """The first ``length`` tokens of a prompt: columns of a row of a cache, from column ``start`` on."""

    cache: KVCache
    row: int
    start: int
    length: int


class RowGroup:
    """A group of rows.

    Args:
        has_kv: for each layer, whether it stores keys and values.
        length: length of the first row that will join.
        slots: maximum number of rows.

    Attributes:
        rows: the running sequences, in the order of the cache's rows.
        starts: the first column of each row.
    """

    def __init__(self, has_kv: Sequence[bool], length: int, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.cache = KVCache(has_kv, 1, length + max(_SPARE_COLUMNS, length // 2))
        self.cache.span.start = self.cache.span.end = length
        self.rows: list[Row] = []
        self.starts: list[int] = []
        self._changed = True
        self._mask: Tensor | None = None
        self.positions = torch.empty(0, 1, dtype=torch.long)

    @property
    def width(self) -> int:
        """Number of columns in use, which is the length of the longest row."""
        return self.cache.span.end - self.cache.span.start

    def prefix(self, row: Row, length: int | None = None) -> CachedPrefix:
        """The first ``length`` tokens of a row; None: all of them."""
        index = self.rows.index(row)
        whole = self.cache.span.end - self.starts[index]
        return CachedPrefix(self.cache, index, self.starts[index], whole if length is None else length)

    def join(self, row: Row, source: CachedPrefix) -> None:
        """Append a row with the keys and values of ``source``; if memory runs out, nothing has changed."""
        count, length = len(self.rows), source.length
        self._make_room(count + 1, length)
        span = self.cache.span
        self.cache.copy_row(source.cache, source.row, source.start, count, span.end - length, length)
        self.rows.append(row)
        self.starts.append(span.end - length)
        row.group = self
        span.rows = count + 1
        self._update_start()

    def remove(self, row: Row) -> None:
        """Remove a row; the last row takes its place."""
        index, last, span = self.rows.index(row), len(self.rows) - 1, self.cache.span
        if index != last:
            start = self.starts[last]
            self.cache.copy_row(self.cache, last, start, index, start, span.end - start)
            self.starts[index], self.rows[index] = start, self.rows[last]
        self.rows.pop()
        self.starts.pop()
        span.rows = last
        if self.rows:
            self._update_start()

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Positions ``[rows, 1]`` of the next tokens, and the attention mask ``[rows, width + 1]`` if rows differ."""
        self._make_room(len(self.rows), 0)
        span = self.cache.span
        if self._changed:
            starts = torch.tensor(self.starts, device=self.device).unsqueeze(1)
            columns = torch.arange(span.column_room, device=self.device)
            self._mask = (columns >= starts).long() if max(self.starts) > span.start else None
            offsets = torch.tensor([row.offset for row in self.rows], device=self.device).unsqueeze(1)
            self.positions = span.end - starts + offsets
            self._changed = False
        return self.positions, None if self._mask is None else self._mask[:, span.start : span.end + 1]

    def advance(self) -> None:
        """Count the column that a forward pass has filled."""
        self.cache.span.end += 1
        self.positions = self.positions + 1

    def _make_room(self, rows: int, length: int) -> None:
        """Ensure room for ``rows`` rows, for ``length`` columns before the common end, and for one column after it."""
        span = self.cache.span
        row_room, room = span.row_room, span.column_room
        if rows <= row_room and length <= span.end < room:
            return
        while row_room < rows:
            row_room = min(2 * row_room, self.slots)
        width = self.width
        needed = max(width, length)
        if 4 * needed > 3 * room:  # moving the rows to the front would make room for few steps
            room = needed + max(_SPARE_COLUMNS, needed // 2)
        shift = needed - width - span.start
        self.cache.relocate(needed - width, row_room, room)
        self.starts = [start + shift for start in self.starts]
        self._changed = True

    def _update_start(self) -> None:
        """Set the first used column after a row joined or left."""
        self.cache.span.start = min(self.starts)
        self._changed = True

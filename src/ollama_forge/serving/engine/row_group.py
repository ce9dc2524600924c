"""Rows of similar length that share one KV cache; each of them pays for the longest of its group, not of the batch.

The rows are right-aligned. Transformers models support this layout, because ``generate`` pads on the left: their
masks, sliding windows and position biases work unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.models.device import upload
from ollama_forge.serving.engine.kv_cache import KVCache

_SPARE_COLUMNS = 64
_versions = itertools.count()


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


def _with_spare(columns: int) -> int:
    return columns + max(_SPARE_COLUMNS, columns // 4)


class RowGroup:
    """A group of rows.

    Args:
        new_cache: makes a cache of a number of rows and at least of a number of columns.
        length: length of the first row that will join.
        slots: maximum number of rows.

    Attributes:
        rows: the running sequences, in the order of the cache's rows.
        starts: the first column of each row.
        version: a number that no group had before; it changes with the rows and their columns, but not by steps.
    """

    def __init__(self, new_cache: Callable[[int, int], KVCache], length: int, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.cache = new_cache(1, _with_spare(length))
        self.cache.span.start = self.cache.span.end = length
        self.rows: list[Row] = []
        self.starts: list[int] = []
        self.version = next(_versions)
        self._inputs_of = -1  # the version that ``_mask`` and ``positions`` are of
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

    def join(self, row: Row, source: CachedPrefix, more: int = 0) -> None:
        """Append a row with the keys and values of ``source``; if memory runs out, nothing has changed.

        Args:
            more: number of such rows that follow, for which there is room then.
        """
        count, length = len(self.rows), source.length
        self._make_room(min(count + 1 + more, self.slots), length)
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

    def release(self) -> None:
        """Drop the rows and give back the memory; the group must not be used any more."""
        self.rows.clear()
        self.cache.release()

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Positions ``[rows, 1]`` of the next tokens, and the attention mask ``[rows, width + 1]`` if rows differ."""
        self.make_room()
        span = self.cache.span
        if self._inputs_of != self.version:
            starts = upload(self.starts, self.device).unsqueeze(1)
            columns = torch.arange(span.column_room, device=self.device)
            self._mask = (columns >= starts).long() if max(self.starts) > span.start else None
            offsets = upload([row.offset for row in self.rows], self.device).unsqueeze(1)
            self.positions = span.end - starts + offsets
            self._inputs_of = self.version
        return self.positions, None if self._mask is None else self._mask[:, span.start : span.end + 1]

    def advance(self) -> None:
        """Count the column that a forward pass over ``inputs`` has filled."""
        self.cache.span.end += 1
        self.positions = self.positions + 1

    def advance_in_graph(self) -> None:
        """Count the column that a step without ``inputs`` has filled."""
        self.cache.span.end += 1
        self._inputs_of = -1

    def make_room(self) -> None:
        """Ensure room for one column after the common end."""
        self._make_room(len(self.rows), 0)

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
            room = _with_spare(needed)
        shift = needed - width - span.start
        self.cache.relocate(needed - width, row_room, room)
        self.starts = [start + shift for start in self.starts]
        self.version = next(_versions)

    def _update_start(self) -> None:
        """Set the first used column after a row joined or left."""
        self.cache.span.start = min(self.starts)
        self.version = next(_versions)

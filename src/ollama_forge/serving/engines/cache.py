"""Keys and values of many sequences in one growing buffer a layer: a step writes one column and copies nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


@dataclass
class Span:
    """What of the buffers is in use: rows ``0..rows``, columns ``start..end``; all rows end at ``end``.

    ``row_room`` and ``column_room`` are the sizes of the buffers.
    """

    row_room: int
    column_room: int
    rows: int
    start: int = 0
    end: int = 0


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, ``[row_room, heads, column_room, dim]`` each."""

    is_sliding = False  # a window is kept whole and cut by the mask
    is_croppable = True

    def __init__(self, span: Span) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.span = span

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._zeros(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _zeros(self, like: Tensor) -> Tensor:
        # zeros, as what a mask hides is still multiplied by nought, and a stray NaN would survive that
        return like.new_zeros(self.span.row_room, like.shape[1], self.span.column_room, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        keys, values, span = self.keys, self.values, self.span
        assert keys is not None
        assert values is not None
        end = span.end + key_states.shape[-2]
        keys[: span.rows, :, span.end : end] = key_states
        values[: span.rows, :, span.end : end] = value_states
        return keys[: span.rows, :, span.start : end], values[: span.rows, :, span.start : end]

    def get_seq_length(self) -> int:
        return self.span.end - self.span.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def relocate(self, start: int, end: int, to: int) -> None:
        """Move columns ``start..end`` to ``to``, into buffers of the span's sizes."""
        self.keys, self.values = (self._moved(old, start, end, to) for old in (self.keys, self.values))

    def _moved(self, old: Tensor | None, start: int, end: int, to: int) -> Tensor | None:
        if old is None:
            return None
        kept = old[: self.span.rows, :, start:end]
        if old.shape[0] == self.span.row_room and old.shape[2] == self.span.column_room:
            new, kept = old, kept.clone()
        else:
            new = self._zeros(old)
        new[: len(kept), :, to : to + end - start] = kept
        return new


class SlotCache(Cache):
    """A transformers cache over ``SlotLayer``; layers that keep nothing of their own stay as they are."""

    def __init__(self, keeps: Sequence[bool], rows: int, columns: int) -> None:
        self.span = Span(rows, columns, rows)
        self._own = [SlotLayer(self.span) if own else None for own in keeps]
        super().__init__(layers=[layer or DummyLayer() for layer in self._own])  # type: ignore[no-untyped-call]

    @property
    def slot_layers(self) -> Iterator[SlotLayer]:
        return (layer for layer in self._own if layer is not None and layer.keys is not None)

    @property
    def nbytes(self) -> int:
        return sum(
            buffer.nbytes for layer in self.slot_layers for buffer in (layer.keys, layer.values) if buffer is not None
        )

    def relocate(self, to: int, rows: int, columns: int) -> None:
        """Make the buffers ``rows`` by ``columns``; what is in use moves so that it starts at column ``to``."""
        span = self.span
        start, end = span.start, span.end
        span.row_room, span.column_room = rows, columns
        for layer in self.slot_layers:
            layer.relocate(start, end, to)
        span.start, span.end = to, to + end - start

    def copy_row(
        self, source: SlotCache, source_row: int, source_start: int, row: int, start: int, length: int
    ) -> None:
        """Copy ``length`` columns of a row of another cache (or of this one) to ``start`` of a row."""
        here, there = slice(start, start + length), slice(source_start, source_start + length)
        for mine, theirs in zip(self._own, source._own, strict=True):
            if mine is None or theirs is None or theirs.keys is None or theirs.values is None:
                continue
            if mine.keys is None or mine.values is None:
                mine.lazy_initialization(theirs.keys, theirs.values)
            for target, origin in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert target is not None
                target[row, :, here] = origin[source_row, :, there]


def kept_layers(config: Any) -> tuple[bool, ...] | None:
    """Which layers keep keys and values of their own; None where some layer keeps another kind of state.

    Such models (linear attention, state spaces, compressed or indexed attention) cannot be put into slots.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in layers):
        return None
    return tuple(not isinstance(layer, DummyLayer) for layer in layers)

"""The KV cache of a batch: one growing buffer per layer, to which a decode step writes one column."""

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
    """The part of the buffers in use: rows ``0..rows`` and columns ``start..end``. Every row ends at column ``end``.

    ``row_room`` and ``column_room`` are the allocated numbers of rows and columns.
    """

    row_room: int
    column_room: int
    rows: int
    start: int = 0
    end: int = 0


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each ``[row_room, heads, column_room, dim]``."""

    is_sliding = False  # sliding windows are stored whole; the attention mask cuts them
    is_croppable = True

    def __init__(self, span: Span) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.span = span

    @property
    def rows(self) -> int:
        return self.span.rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._zeros(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _zeros(self, like: Tensor) -> Tensor:
        # zeros, because attention multiplies masked values by 0, and a leftover NaN would stay NaN
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

    def moved(self, start: int, end: int, to: int, span: Span) -> tuple[Tensor, Tensor]:
        """New buffers of the sizes of ``span``, with columns ``start..end`` at column ``to``."""
        return self._moved(self.keys, start, end, to, span), self._moved(self.values, start, end, to, span)

    @staticmethod
    def _moved(old: Tensor | None, start: int, end: int, to: int, span: Span) -> Tensor:
        assert old is not None
        new = old.new_zeros(span.row_room, old.shape[1], span.column_room, old.shape[3])
        new[: span.rows, :, to : to + end - start] = old[: span.rows, :, start:end]
        return new


class FilledLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values ``[rows, heads, columns, dim]`` that are there before a step, which attends to all columns."""

    is_compileable = True  # transformers then makes masks without looking at tensors
    is_sliding = False
    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the keys and values are there before a step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tensors[0].shape[2], 0

    def get_max_length(self) -> int:
        return self.tensors[0].shape[2]


@dataclass(frozen=True)
class Layout:
    """The layout of keys and values that all layers of a model have in common.

    Attributes:
        like: an empty tensor of their type and device.
    """

    layers: int
    heads: int
    dim: int
    like: Tensor

    @classmethod
    def of(cls, cache: KVCache) -> Layout | None:
        """The layout of a cache that is in use; None if its layers differ."""
        buffers = [buffer for layer in cache._own if layer is not None for buffer in (layer.keys, layer.values)]
        if not buffers or any(buffer is None for buffer in buffers):
            return None
        kinds = {(b.shape[1], b.shape[3], b.dtype, b.device) for b in buffers if b is not None}
        first = buffers[0]
        assert first is not None
        if len(kinds) > 1:
            return None
        return cls(len(buffers) // 2, first.shape[1], first.shape[3], first.new_empty(0))

    def zeros(self, rows: int, columns: int) -> Tensor:
        return self.like.new_zeros(self.layers, 2, rows, self.heads, columns, self.dim)


class KVCache(Cache):
    """A transformers ``Cache`` with a ``KVLayer`` for each layer that stores keys and values of its own.

    Args:
        has_kv: for each layer, whether it stores keys and values (``layers_with_kv``).
        rows, columns: initial sizes of the buffers.
        layout: the layers' common layout, with which they share one tensor; None: each allocates its own when needed.

    Attributes:
        stack: the tensor ``[layers, 2, rows, heads, columns, dim]`` that the layers share. On a GPU, one copy takes
            the place of one for each layer's keys and values, which cost more to launch than to do.
    """

    def __init__(self, has_kv: Sequence[bool], rows: int, columns: int, layout: Layout | None = None) -> None:
        self.span = Span(rows, columns, rows)
        self._own = [KVLayer(self.span) if own else None for own in has_kv]
        super().__init__(layers=[layer or DummyLayer() for layer in self._own])  # type: ignore[no-untyped-call]
        self.stack: Tensor | None = None
        if layout is not None:
            self._share(layout.zeros(rows, columns))

    def _share(self, stack: Tensor) -> None:
        self.stack = stack
        layers = [layer for layer in self._own if layer is not None]
        for layer, (keys, values) in zip(layers, stack, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True

    @property
    def filled_layers(self) -> Iterator[KVLayer]:
        return (layer for layer in self._own if layer is not None and layer.keys is not None)

    @staticmethod
    def same_layers(caches: Sequence[KVCache]) -> Iterator[list[KVLayer]]:
        """For each layer of the model, the layers of all caches; an empty list if the layer stores nothing."""
        for layers in zip(*(cache._own for cache in caches), strict=True):
            yield [layer for layer in layers if layer is not None]

    @property
    def nbytes(self) -> int:
        return sum(
            buffer.nbytes for layer in self.filled_layers for buffer in (layer.keys, layer.values) if buffer is not None
        )

    def views(self, end: int) -> list[Tensor]:
        """The keys and values of each layer that stores some: the used rows, and the columns up to ``end``."""
        span = self.span
        if self.stack is not None:
            return list(self.stack[:, :, : span.rows, :, span.start : end].flatten(0, 1).unbind())
        buffers = (buffer for layer in self.filled_layers for buffer in (layer.keys, layer.values))
        return [buffer[: span.rows, :, span.start : end] for buffer in buffers if buffer is not None]

    def relocate(self, to: int, rows: int, columns: int) -> None:
        """Resize the buffers to ``rows`` by ``columns``, and move the used columns so that they start at ``to``.

        If memory runs out, nothing has changed: all new buffers are allocated before the first old one is freed.
        """
        span = self.span
        start, end = span.start, span.end
        new = Span(rows, columns, span.rows, to, to + end - start)
        if self.stack is not None:
            old = self.stack
            shape = (*old.shape[:2], rows, old.shape[3], columns, old.shape[5])
            self._move_to(old.new_zeros(shape), new)
            return
        buffers = [layer.moved(start, end, to, new) for layer in self.filled_layers]
        for layer, (keys, values) in zip(self.filled_layers, buffers, strict=True):
            layer.keys, layer.values = keys, values
        span.row_room, span.column_room, span.start, span.end = rows, columns, new.start, new.end

    def _move_to(self, stack: Tensor, new: Span) -> None:
        """Move the used columns to another stack, of the sizes of ``new``."""
        span, old = self.span, self.stack
        assert old is not None
        stack[:, :, : span.rows, :, new.start : new.end] = old[:, :, : span.rows, :, span.start : span.end]
        self._share(stack)
        span.row_room, span.column_room, span.start, span.end = new.row_room, new.column_room, new.start, new.end

    def release(self) -> None:
        """Drop the buffers; the cache must not be used any more."""
        self.stack = None
        for layer in self.filled_layers:
            layer.keys = layer.values = None

    def copy_row(self, source: KVCache, source_row: int, source_start: int, row: int, start: int, length: int) -> None:
        """Copy ``length`` columns from column ``source_start`` of ``source_row`` to column ``start`` of ``row``.

        ``source`` may be this cache.
        """
        columns, source_columns = slice(start, start + length), slice(source_start, source_start + length)
        if self.stack is not None and source.stack is not None:
            self.stack[:, :, row, :, columns] = source.stack[:, :, source_row, :, source_columns]
            return
        for mine, theirs in zip(self._own, source._own, strict=True):
            if mine is None or theirs is None or theirs.keys is None or theirs.values is None:
                continue
            if mine.keys is None or mine.values is None:
                mine.lazy_initialization(theirs.keys, theirs.values)
            for target, origin in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert target is not None
                target[row, :, columns] = origin[source_row, :, source_columns]


def layers_with_kv(config: Any) -> tuple[bool, ...] | None:
    """For each layer, whether it stores keys and values of its own; None if a layer stores another kind of state.

    Models with such layers (linear attention, state spaces, compressed or indexed attention) cannot be batched here.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in layers):
        return None
    return tuple(not isinstance(layer, DummyLayer) for layer in layers)

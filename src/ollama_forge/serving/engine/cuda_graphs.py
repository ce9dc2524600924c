"""CUDA graphs: a decode step is recorded once for each shape, and then launched as one operation.

A graph needs the same shapes and the same addresses at each step. So a group's keys and values have a power of two of
columns, of which all are attended to and the unused ones masked; the rows are padded to a power of two; and where the
step writes is a tensor. Buffers that a group no longer needs are kept with their graphs for the next group of that
size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from ollama_forge.models.device import is_out_of_memory, planned_attention, upload
from ollama_forge.serving.engine.device_use import DEVICE_USE
from ollama_forge.serving.engine.host_reads import NoHostReads
from ollama_forge.serving.engine.kv_cache import FilledLayer, KVCache, KVLayer, Layout
from ollama_forge.serving.engine.model_runner import Forward
from ollama_forge.serving.engine.row_group import RowGroup

_LOG = logging.getLogger(__name__)
_LEAST_COLUMNS = 256
_STEPS_BEFORE_CAPTURE = 3  # that buffers have had as many rows: captures cost some ten steps, and rows may come and go
_STEPS_BEFORE_RETRY = 200  # after memory ran out, or another model was loaded meanwhile
_WAIT_SECONDS = 0.1

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``."""
    return max(least, 1 << (count - 1).bit_length())


# -- buffers ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Buffers:
    """The keys and values of a group of rows, with the graphs that were captured on them.

    Attributes:
        layers: for each layer of the model, keys and values, each ``[rows, heads, columns, dim]``; None: it has none.
        stack: the tensor that the layers share; None if they do not.
        graphs: by number of rows.
        steps: number of steps without a graph, by number of rows.
    """

    rows: int
    columns: int
    layers: list[tuple[Tensor, Tensor] | None]
    stack: Tensor | None = None
    graphs: dict[int, StepGraph] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self)

    def __iter__(self) -> Iterator[Tensor]:
        if self.stack is not None:
            return iter([self.stack])
        return (buffer for pair in self.layers if pair is not None for buffer in pair)


class BufferPool:
    """Keeps the buffers of groups that have ended.

    Args:
        nbytes: maximum size of the buffers that are kept; the least recently used ones are dropped first.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.free: list[Buffers] = []

    def take(self, rows: int, columns: int) -> Buffers | None:
        """Buffers of this size, filled with zeros; None if there are none."""
        for place, buffers in enumerate(self.free):
            if (buffers.rows, buffers.columns) == (rows, columns):
                del self.free[place]
                for buffer in buffers:
                    buffer.zero_()  # a leftover NaN would stay NaN, although it is masked
                return buffers
        return None

    def give(self, buffers: Buffers) -> None:
        self.free.append(buffers)
        while sum(each.nbytes for each in self.free) > self.nbytes:
            self.free.pop(0)


class PooledKVCache(KVCache):
    """A ``KVCache`` whose buffers have a power of two of columns, and come from a pool.

    Args:
        rows, columns: initial sizes; ``columns`` is rounded up.
    """

    def __init__(
        self, has_kv: Sequence[bool], rows: int, columns: int, layout: Layout | None, pool: BufferPool
    ) -> None:
        columns = power_of_two(columns, _LEAST_COLUMNS)
        kept = pool.take(rows, columns)
        super().__init__(has_kv, rows, columns, layout if kept is None else None)
        self.pool = pool
        self._buffers = kept
        if kept is not None:
            self._use(kept)

    @property
    def buffers(self) -> Buffers:
        """The buffers, whose graphs are of this size; call this once each layer has some."""
        if self._buffers is None:
            layers = [_buffers_of(layer) for layer in self._own]
            self._buffers = Buffers(self.span.row_room, self.span.column_room, layers, self.stack)
        return self._buffers

    def _use(self, buffers: Buffers) -> None:
        self._buffers, self.stack = buffers, buffers.stack
        for layer, pair in zip(self._own, buffers.layers, strict=True):
            if layer is not None and pair is not None:
                layer.keys, layer.values = pair
                layer.is_initialized = True

    def relocate(self, to: int, rows: int, columns: int) -> None:
        columns = power_of_two(columns, _LEAST_COLUMNS)
        new = self.pool.take(rows, columns) if next(self.filled_layers, None) is not None else None
        if new is None:
            old = self._buffers
            super().relocate(to, rows, columns)
            self._buffers = None
        else:
            span, old = self.span, self.buffers
            start, end = span.start, span.end
            for target, origin in zip(new, old, strict=True):
                target[..., : span.rows, :, to : to + end - start, :] = origin[..., : span.rows, :, start:end, :]
            self._use(new)
            span.row_room, span.column_room, span.start, span.end = rows, columns, to, to + end - start
        if old is not None:
            self.pool.give(old)

    def release(self) -> None:
        """Give the buffers back; the cache must not be used any more."""
        if next(self.filled_layers, None) is not None:
            self.pool.give(self.buffers)
        self._buffers = self.stack = None


def _buffers_of(layer: KVLayer | None) -> tuple[Tensor, Tensor] | None:
    if layer is None or layer.keys is None or layer.values is None:
        return None
    return layer.keys, layer.values


# -- one step ---------------------------------------------------------------------------------------------------------


class _StaticLayer(FilledLayer):  # type: ignore[no-untyped-call]
    """Some rows of a layer's buffers, at whose column ``column`` (``[1]``, on the device) a step writes."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int, column: Tensor) -> None:
        super().__init__(keys[:rows], values[:rows])
        self.column = column

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.tensors
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values

    def get_seq_length(self) -> Any:
        return self.column[0]


class StepGraph:
    """A decode step of a number of rows on the buffers of a cache.

    The step itself moves on to the next column, so that nothing but ids has to be set before the next one.
    """

    def __init__(self, forward: Forward, cache: PooledKVCache, rows: int) -> None:
        device, columns = forward.device, cache.span.column_room
        self.rows, self.columns = rows, columns
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._starts = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._numbers = torch.arange(columns, device=device)
        self._mask = torch.ones(rows, columns, dtype=torch.long, device=device)
        layers: list[Any] = [
            _StaticLayer(*pair, rows, self._column) if pair is not None else DummyLayer()  # type: ignore[no-untyped-call]
            for pair in cache.buffers.layers
        ]
        self._forward, self._cache = forward, Cache(layers=layers)
        self._loaded: tuple[int, int] | None = None  # the group's version and end for which the tensors are set
        self._replay: Replay | None = None
        self._logits = self._column

    def capture(self, group: RowGroup, capture: Capture) -> None:
        """Run the step once for a group, which changes nothing that its next step does not set again; record it.

        Raises:
            HostReadError: the model makes the host wait for the device.
        """
        with planned_attention(self.ids.device):
            self._load(group)
            with NoHostReads(self.ids.device):
                self._run()
            self._load(group)
            self._replay, self._logits = capture(self._run)
        self._loaded = None

    def step(self, group: RowGroup, ids: Tensor) -> Tensor:
        """Decode a group with ids ``[rows, 1]``; the logits are valid until the next step of any graph."""
        assert self._replay is not None
        if self._loaded != (group.version, group.cache.span.end):
            self._load(group)
        self.ids[: len(ids)].copy_(ids)
        self._replay()
        self._forward.passes += 1
        self._loaded = group.version, group.cache.span.end + 1
        return self._logits[: len(ids)]

    def _load(self, group: RowGroup) -> None:
        """Set the columns of the group's rows. Rows beyond them are at position 0, and see what is in the buffers."""
        beyond = self.rows - len(group.rows)
        zero = [start - row.offset for start, row in zip(group.starts, group.rows, strict=True)]  # of positions
        starts = upload([zero + [self.columns] * beyond, group.starts + [0] * beyond], self._starts.device)
        self._starts.copy_(starts.unsqueeze(2))
        self._mask.copy_(self._numbers >= self._starts[1])
        self._column.fill_(group.cache.span.end)

    def _run(self) -> Tensor:
        positions = (self._column - self._starts[0]).clamp_min(0)
        logits, _ = self._forward(self.ids, self._cache, position_ids=positions, attention_mask=self._mask)
        self._column.add_(1)
        return logits


class StepGraphs:
    """Decodes groups of rows, by a graph once a number of rows has stayed for some steps.

    Args:
        has_kv: for each layer, whether it stores keys and values.
        nbytes: maximum size of the buffers that are kept for later groups.
        capture: records a step; None: a CUDA graph.
        patience: number of steps without a graph before one is captured.
        wait: seconds for which a capture waits until no other thread uses the GPU; then it is tried again later.

    Attributes:
        failed: whether a capture failed, after which no other is tried.
        captured: number of graphs that were captured.
    """

    def __init__(
        self,
        forward: Forward,
        has_kv: Sequence[bool],
        nbytes: int,
        *,
        capture: Capture | None = None,
        patience: int = _STEPS_BEFORE_CAPTURE,
        wait: float = _WAIT_SECONDS,
    ) -> None:
        self.forward, self.has_kv, self.patience, self.wait = forward, has_kv, patience, wait
        self.pool = BufferPool(nbytes)
        self.failed, self.captured = False, 0
        self._capture = capture or CudaCapture(forward.device)

    def new_cache(self, rows: int, columns: int, layout: Layout | None) -> PooledKVCache:
        return PooledKVCache(self.has_kv, rows, columns, layout, self.pool)

    def step(self, group: RowGroup, ids: Tensor) -> Tensor:
        """Decode a group with ids ``[rows, 1]``: logits ``[rows, vocabulary]``, valid until the next step."""
        group.make_room()
        graph = None if self.failed else self._graph(group)
        if graph is None:
            positions, mask = group.inputs()
            more = {} if mask is None else {"attention_mask": mask}
            logits = self.forward(ids, group.cache, position_ids=positions, **more)[0]
            group.advance()
            return logits
        logits = graph.step(group, ids)
        group.advance_in_graph()
        return logits

    def _graph(self, group: RowGroup) -> StepGraph | None:
        """The graph for a group's rows; it is captured when the group has been stepped often enough."""
        assert isinstance(group.cache, PooledKVCache)
        buffers = group.cache.buffers
        rows = min(power_of_two(len(group.rows)), buffers.rows)
        if rows in buffers.graphs:
            return buffers.graphs[rows]
        steps = buffers.steps[rows] = buffers.steps.get(rows, 0) + 1
        if steps <= self.patience:
            return None
        with DEVICE_USE.alone(self.wait) as alone:
            graph = self._captured(group, rows) if alone else None
        if graph is None:
            buffers.steps[rows] = -_STEPS_BEFORE_RETRY
        else:
            buffers.graphs[rows] = graph
            self.captured += 1
        return graph

    def _captured(self, group: RowGroup, rows: int) -> StepGraph | None:
        assert isinstance(group.cache, PooledKVCache)
        try:
            graph = StepGraph(self.forward, group.cache, rows)
            graph.capture(group, self._capture)
        except Exception as error:
            if is_out_of_memory(error):
                self.pool.free.clear()
                return None
            _LOG.info("decode steps run without CUDA graphs: %s", error)
            self.failed = True
            return None
        return graph

    def clear(self) -> None:
        """Forget all buffers and graphs."""
        self.pool.free.clear()


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device, since cuBLAS keeps 32 MiB for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaCapture:
    """Records what a function launches as a CUDA graph; all graphs of a model share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread-local: what other threads allocate and copy does not end the capture
        stream = _capture_stream(self.device)
        mode = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
        collects = gc.isenabled()
        gc.disable()  # a graph that is collected now would end the capture
        try:
            with torch.cuda.device(self.device), mode:
                output = run()
        finally:
            if collects:
                gc.enable()
        return graph.replay, output

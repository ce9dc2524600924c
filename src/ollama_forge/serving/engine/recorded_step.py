"""A decode step on the CPU that is recorded once, and then runs without Python, which takes a third of a small model's.

``torch.jit.trace`` records the operations of one step; numbers of rows and columns remain variable. A recording
follows no decision that the model makes in Python, so a model whose decisions depend on values (which experts a token
needs) is not recorded, and sizes that are new are compared with the model itself once.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from ollama_forge.models.cpu_packing import packed_weights
from ollama_forge.models.device import is_out_of_memory
from ollama_forge.serving.engine.grouped_attention import AttentionSwitch, GroupedLayer
from ollama_forge.serving.engine.host_reads import NoHostReads
from ollama_forge.serving.engine.kv_cache import FilledLayer, KVCache
from ollama_forge.serving.engine.model_runner import Forward, differ_by_rounding

_LOG = logging.getLogger(__name__)
_STEPS_BEFORE_GROUPS = 16  # that are made by the model: a recording takes as long as some fifty steps

Run = Callable[..., Tensor]


class _View(FilledLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a group's layer, to whose last column the step writes."""

    @property
    def rows(self) -> int:
        return self.tensors[0].shape[0]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.tensors
        keys[:, :, -1:].copy_(key_states)
        values[:, :, -1:].copy_(value_states)
        return keys, values

    def get_seq_length(self) -> int:
        return self.tensors[0].shape[2] - 1


class RecordedStep:
    """Decode steps; as long as nothing is recorded, and for good once that failed, by the model.

    Each number of groups of rows (``row_group``) has a recording of its own.

    Args:
        has_kv: for each layer, whether it stores keys and values.
        joins_queries: see ``BatchedRunner``.

    Attributes:
        failed: the numbers of groups for which the model cannot be recorded, or a recording computed something else.
    """

    def __init__(self, forward: Forward, has_kv: Sequence[bool], *, joins_queries: bool = False) -> None:
        self.forward, self.has_kv, self.joins_queries = forward, has_kv, joins_queries
        self.failed: set[int] = set()
        self._switch = AttentionSwitch(forward.model.module)
        self._runs: dict[int, Run] = {}
        self._state: list[Tensor] = []
        self._compared: set[tuple[int, ...]] = set()
        self._steps: Counter[int] = Counter()  # by the model, while there is no recording

    def fails(self, groups: int) -> bool:
        """Whether steps of so many groups are not recorded."""
        return 1 in self.failed or groups in self.failed

    def __call__(
        self,
        ids: Tensor,
        caches: Sequence[KVCache],
        positions: Tensor,
        mask: Tensor | None,
        by_model: Callable[[], Tensor],
    ) -> Tensor:
        """Logits ``[rows, vocabulary]`` of the next tokens ``[rows, 1]``; the ends of the caches stay where they are.

        Args:
            caches: of the groups, the widest last.
            mask: ``[rows, columns]``, with the columns of the widest; None: all rows of the only group are as wide.
            by_model: the same step by the model.
        """
        count = len(caches)
        if self.fails(count) or self._waits(count):
            return by_model()
        sizes = self._sizes(caches)
        if sizes <= self._compared:
            return self._replay(ids, caches, positions, mask)
        expected = by_model()
        holds = False
        try:
            if count not in self._runs:
                self._record(ids, caches, positions, mask)
            found = self._replay(ids, caches, positions, mask)  # it writes the same column again
            self.forward.passes -= 1  # it is the same step
            holds = differ_by_rounding(found, expected)
        except Exception as error:  # a model may do anything that cannot be recorded
            if is_out_of_memory(error):
                raise
            _LOG.info("decode steps of %d groups are not recorded: %s", count, error)
        if holds:
            self._compared |= sizes
            return expected
        self.failed.add(count)
        self._runs.pop(count, None)
        if not self._runs:
            self._state = []
        return by_model()  # the replay has written other keys and values

    def _waits(self, count: int) -> bool:
        """Whether so many groups may soon be fewer again, so that they are not worth a recording yet."""
        if count == 1 or count in self._runs:
            return False
        self._steps[count] += 1
        return self._steps[count] <= _STEPS_BEFORE_GROUPS

    @staticmethod
    def _sizes(caches: Sequence[KVCache]) -> set[tuple[int, ...]]:
        """What has to be compared once: the number of all rows, and each group's with the power of two of columns."""
        spans = [cache.span for cache in caches]
        groups = {
            (len(caches), place, span.rows, (span.end - span.start).bit_length()) for place, span in enumerate(spans)
        }
        return groups | {(len(caches), sum(span.rows for span in spans))}

    def _replay(self, ids: Tensor, caches: Sequence[KVCache], positions: Tensor, mask: Tensor | None) -> Tensor:
        self.forward.passes += 1
        return self._runs[len(caches)](*self._inputs(ids, caches, positions, mask), self._state)

    @staticmethod
    def _inputs(ids: Tensor, caches: Sequence[KVCache], positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        views = [cache.views(cache.span.end + 1) for cache in caches]
        if mask is None:
            mask = positions.new_ones(len(ids), views[-1][0].shape[2])
        return ids, positions, mask, views

    def _record(self, ids: Tensor, caches: Sequence[KVCache], positions: Tensor, mask: Tensor | None) -> None:
        """Record the step.

        Raises:
            Exception: the model decides by values, or holds tensors that the recording would keep in memory.
        """
        inputs = self._inputs(ids, caches, positions, mask)
        module = self.forward.model.module
        held = [*module.parameters(), *module.buffers(), *packed_weights(module)]
        state = list({id(tensor): tensor for tensor in held}.values())
        arguments = (*inputs, state)
        with self._switch.grouped() if len(caches) > 1 or self.joins_queries else nullcontext():
            with NoHostReads(ids.device):
                self._step(*arguments)
            with warnings.catch_warnings():  # of decisions that depend on sizes, which are compared
                warnings.simplefilter("ignore")
                run: Any = torch.jit.trace(self._step, arguments, check_trace=False)  # type: ignore[no-untyped-call]
        for node in run.graph.findAllNodes("prim::Constant"):
            if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").numel() > 1:
                raise ValueError("the model computes with a tensor that is neither a parameter nor a buffer")
        self._runs[len(caches)] = run
        self._state = [tensor.detach() if tensor.requires_grad else tensor for tensor in state]

    def _step(
        self, ids: Tensor, positions: Tensor, mask: Tensor, views: Sequence[Sequence[Tensor]], _: Sequence[Tensor]
    ) -> Tensor:
        """A step as a function of all tensors it reads; others would be constants of the recording."""
        each = [(_View(*pair) for pair in zip(own[::2], own[1::2], strict=True)) for own in views]
        layers: list[Any] = [self._layer([next(own) for own in each]) if has else DummyLayer() for has in self.has_kv]  # type: ignore[no-untyped-call]
        logits, _cache = self.forward(ids, Cache(layers=layers), position_ids=positions, attention_mask=mask)
        return logits

    @staticmethod
    def _layer(groups: Sequence[_View]) -> CacheLayerMixin:
        return groups[0] if len(groups) == 1 else GroupedLayer(groups)

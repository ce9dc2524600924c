"""A decode step on the CPU that is recorded once, and then runs without Python, which takes a third of a small model's.

``torch.jit.trace`` records the operations of one step; numbers of rows and columns remain variable. A recording
follows no decision that the model makes in Python, so a model whose decisions depend on values (which experts a token
needs) is not recorded, and sizes that are new are compared with the model itself once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from ollama_forge.models.cpu_packing import packed_weights
from ollama_forge.models.device import is_out_of_memory
from ollama_forge.serving.engine.host_reads import NoHostReads
from ollama_forge.serving.engine.kv_cache import KVCache
from ollama_forge.serving.engine.model_runner import Forward

_LOG = logging.getLogger(__name__)
_TOLERANCE = 0.05  # of the logits' standard deviation; rounding of bfloat16 stays below a third of it

Run = Callable[..., Tensor]


class _View(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of a layer, to whose last column the step writes."""

    is_compileable = True  # transformers then makes masks without looking at tensors
    is_sliding = False
    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a step is recorded on keys and values that are there")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.get_mask_sizes(1)[0] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1


class RecordedStep:
    """Decode steps of a group of rows; as long as nothing is recorded, and for good once that failed, by the model.

    Args:
        has_kv: for each layer, whether it stores keys and values.

    Attributes:
        failed: whether the model cannot be recorded, or a recording computed something else.
    """

    def __init__(self, forward: Forward, has_kv: Sequence[bool]) -> None:
        self.forward, self.has_kv = forward, has_kv
        self.failed = False
        self._run: Run | None = None
        self._state: list[Tensor] = []
        self._compared: set[tuple[int, int]] = set()  # rows, and the power of two of columns

    def __call__(self, ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Logits ``[rows, vocabulary]`` of the next tokens ``[rows, 1]``; the cache's end stays where it is."""
        span = cache.span
        sizes = span.rows, (span.end - span.start).bit_length()
        if self.failed:
            return self._by_model(ids, cache, positions, mask)
        if sizes in self._compared:
            return self._replay(ids, cache, positions, mask)
        expected = self._by_model(ids, cache, positions, mask)
        try:
            if self._run is None:
                self._record(ids, cache, positions, mask)
            found = self._replay(ids, cache, positions, mask)  # it writes the same column again
            self.forward.passes -= 1  # it is the same step
            difference = (found.float() - expected.float()).abs().mean()
            self.failed = not difference <= _TOLERANCE * expected.float().std()
        except Exception as error:  # a model may do anything that cannot be recorded
            if is_out_of_memory(error):
                raise
            _LOG.info("decode steps are not recorded: %s", error)
            self.failed = True
        self._compared.add(sizes)
        if not self.failed:
            return expected
        self._run, self._state = None, []
        return self._by_model(ids, cache, positions, mask)  # the replay has written other keys and values

    def _by_model(self, ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        more = {} if mask is None else {"attention_mask": mask}
        return self.forward(ids, cache, position_ids=positions, **more)[0]

    def _replay(self, ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        assert self._run is not None
        self.forward.passes += 1
        return self._run(*self._inputs(ids, cache, positions, mask), self._state)

    @staticmethod
    def _inputs(ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        views = cache.views(cache.span.end + 1)
        if mask is None:
            mask = positions.new_ones(len(ids), views[0].shape[2])
        return ids, positions, mask, views

    def _record(self, ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> None:
        """Record the step.

        Raises:
            Exception: the model decides by values, or holds tensors that the recording would keep in memory.
        """
        inputs = self._inputs(ids, cache, positions, mask)
        module = self.forward.model.module
        held = [*module.parameters(), *module.buffers(), *packed_weights(module)]
        state = list({id(tensor): tensor for tensor in held}.values())
        arguments = (*inputs, state)
        with NoHostReads(ids.device):
            self._step(*arguments)
        with warnings.catch_warnings():  # of decisions that depend on sizes, which are compared
            warnings.simplefilter("ignore")
            run: Any = torch.jit.trace(self._step, arguments, check_trace=False)  # type: ignore[no-untyped-call]
        for node in run.graph.findAllNodes("prim::Constant"):
            if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").numel() > 1:
                raise ValueError("the model computes with a tensor that is neither a parameter nor a buffer")
        self._run, self._state = run, [tensor.detach() if tensor.requires_grad else tensor for tensor in state]

    def _step(
        self, ids: Tensor, positions: Tensor, mask: Tensor, views: Sequence[Tensor], _: Sequence[Tensor]
    ) -> Tensor:
        """A step as a function of all tensors it reads; others would be constants of the recording."""
        pairs = iter(zip(views[::2], views[1::2], strict=True))
        layers: list[Any] = [_View(*next(pairs)) if own else DummyLayer() for own in self.has_kv]  # type: ignore[no-untyped-call]
        logits, _cache = self.forward(ids, Cache(layers=layers), position_ids=positions, attention_mask=mask)
        return logits

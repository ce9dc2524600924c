"""Embeddings of a causal language model: the mean of its last hidden states, in slices between decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.models.chat_model import ChatModel
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.kv_cache import KVCache
from ollama_forge.serving.engine.model_runner import Forward, ModelRunner, chunk_of

_ROWS = 16

Vectors = list[list[float]]
Work = Callable[[], Vectors | None]  # computes a slice; None: there is more to compute


def embedding_work(
    forward: Forward, runner: ModelRunner, inputs: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Work]]:
    """Split inputs into batches: the indices of a batch's inputs, and the work that returns their vectors.

    Decode steps wait for a slice of work, so none is longer than a chunk of a prefill, but for an input that is longer
    than a chunk and cannot be split.
    """
    chunk = min(runner.chunk, chunk_of(forward.device))
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    while order:
        longest = len(inputs[order[0]])
        if longest > runner.chunk and isinstance(runner, BatchedRunner):
            first = order.pop(0)
            yield [first], _LongInput(forward, runner, inputs[first])
            continue
        count = max(1, min(_ROWS, chunk // longest))
        batch, order = order[:count], order[count:]
        yield batch, partial(_embed, forward.model, [list(inputs[index]) for index in batch])


def _embed(model: ChatModel, inputs: list[list[int]]) -> Vectors:
    """Embed a batch; in 16 bits, where sums over padding are rounded otherwise, inputs of one length at a time."""
    if next(model.module.parameters()).dtype.itemsize > 2:
        return _embed_padded(model, inputs)
    vectors: Vectors = [[] for _ in inputs]
    for length in {len(ids) for ids in inputs}:
        indices = [index for index, ids in enumerate(inputs) if len(ids) == length]
        for index, vector in zip(indices, _embed_padded(model, [inputs[index] for index in indices]), strict=True):
            vectors[index] = vector
    return vectors


@torch.inference_mode()
def _embed_padded(model: ChatModel, inputs: list[list[int]]) -> Vectors:
    # padding on the right, unlike elsewhere: positions need no correction, and no token attends to the padding after it
    width = max(map(len, inputs))
    ids = torch.tensor([row + [model.tokenizer.pad_id] * (width - len(row)) for row in inputs], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=model.device)
    module: Any = model.module
    hidden = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
    weights = mask.unsqueeze(-1).to(hidden.device).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    vectors: Vectors = nn.functional.normalize(mean, dim=-1).tolist()
    return vectors


class _LongInput:
    """Embeds one input in chunks; each call computes one."""

    def __init__(self, forward: Forward, runner: BatchedRunner, ids: Sequence[int]) -> None:
        self.forward, self.chunk = forward, runner.chunk
        self._ids = torch.tensor([list(ids)], device=forward.device)
        self._cache = KVCache(runner.has_kv, 1, len(ids))
        self._sum: Tensor | None = None

    @torch.inference_mode()
    def __call__(self) -> Vectors | None:
        span, length = self._cache.span, self._ids.shape[1]
        end = min(length, span.end + self.chunk)
        module: Any = self.forward.model.module
        hidden = module.base_model(
            input_ids=self._ids[:, span.end : end], use_cache=True, **{self.forward.cache_name: self._cache}
        ).last_hidden_state.float()
        span.end = end
        self._sum = hidden.sum(1) + (self._sum if self._sum is not None else 0)
        if end < length:
            return None
        vectors: Vectors = nn.functional.normalize(self._sum / length, dim=-1).tolist()
        return vectors

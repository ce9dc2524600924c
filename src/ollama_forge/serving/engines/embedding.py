"""Embeddings: the mean of a text's last hidden states, L2-normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ollama_forge.models.chat_model import ChatModel

_ROWS = 16
_TOKENS = 4096  # maximum of a batch, padding included; decode steps wait while a batch is computed

Work = Callable[[], list[list[float]]]


def embed_batches(model: ChatModel, inputs: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Work]]:
    """Split inputs into batches: the indices of a batch's inputs, and a function that returns their vectors."""
    order = sorted(range(len(inputs)), key=lambda place: -len(inputs[place]))
    while order:
        count = max(1, min(_ROWS, _TOKENS // len(inputs[order[0]])))
        rows, order = order[:count], order[count:]
        yield rows, _work(model, [list(inputs[row]) for row in rows])


def _work(model: ChatModel, texts: list[list[int]]) -> Work:
    return lambda: _embed(model, texts)


@torch.inference_mode()
def _embed(model: ChatModel, texts: list[list[int]]) -> list[list[float]]:
    # padding on the right, unlike elsewhere: positions need no correction, and no token attends to the padding after it
    width = max(map(len, texts))
    ids = torch.tensor([text + [model.tokenizer.pad_id] * (width - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
    module: Any = model.module
    hidden = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    vectors: list[list[float]] = nn.functional.normalize(mean, dim=-1).tolist()
    return vectors

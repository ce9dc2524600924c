"""The model as the scheduler sees it: prompts are prefilled in chunks, join the decode batch and leave it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ollama_forge.models.chat_model import ChatModel

Media = Mapping[str, Tensor] | None


class Prefill(Protocol):
    """The prefill of some prompts. ``tokens`` is the number of tokens that it computes, without padding."""

    @property
    def tokens(self) -> int: ...

    def advance(self) -> Tensor | None:
        """Run the next chunk; the last chunk returns the logits ``[prompts, vocabulary]`` of the last positions."""
        ...


class Runner(Protocol):
    """The decode batch: its sequences are rows, numbered from 0 without gaps."""

    @property
    def slots(self) -> int: ...

    def unknown(self, prompt: Sequence[int]) -> int:
        """Number of tokens of a prompt that the prefix cache does not cover."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> Prefill:
        """Start to prefill prompts; with ``media``, one prompt, which does not use the prefix cache."""
        ...

    def join(self, prefill: Any, place: int) -> None:
        """Append the prefilled prompt number ``place`` to the batch as its last row."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Decode: feed each row its token, return the logits ``[rows, vocabulary]``."""
        ...

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        """Remove a row; the last row takes its number. If ``ids`` are given, the prefix cache keeps its state."""
        ...

    def reset(self) -> None:
        """Remove all rows and empty the prefix cache."""
        ...


class Forward:
    """The model's forward pass; it leaves out inputs that the model does not take, and counts the passes."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model
        self.passes = 0
        parameters = inspect.signature(model.module.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.cache_name = next(
            (name for name in ("cache", "past_key_values", "cache_params") if name in parameters), "cache"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, ids: Tensor, cache: Any, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits ``[rows, vocabulary]`` of the last position, and the updated cache."""
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        inputs[self.cache_name] = cache
        self.passes += 1
        result = self.model.forward(input_ids=ids, use_cache=True, **inputs)
        return result.logits[:, -1], getattr(result, self.cache_name)


def on_device(media: Media, model: ChatModel) -> dict[str, Tensor]:
    """Media on the model's device; floating-point tensors also get the model's dtype."""
    dtype = next(model.module.parameters()).dtype
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else None)
        for name, tensor in (media or {}).items()
    }

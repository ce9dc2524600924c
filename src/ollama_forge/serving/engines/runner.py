"""How a scheduler sees a model: prompts are prefilled in pieces, join what is being decoded, and leave it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ollama_forge.models.chat_model import ChatModel

Media = Mapping[str, Tensor] | None


class Prefill(Protocol):
    """Prompts on their way. ``tokens`` is how many are computed, padding not counted."""

    @property
    def tokens(self) -> int: ...

    def advance(self) -> Tensor | None:
        """Run the next piece; logits ``[prompts, vocabulary]`` of the last positions after the last one."""
        ...


class Runner(Protocol):
    """The sequences being decoded, numbered from 0 without gaps."""

    @property
    def slots(self) -> int: ...

    def unknown(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt have to be computed."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> Prefill:
        """``media`` go with a single prompt, of which nothing is known then."""
        ...

    def join(self, prefill: Any, place: int) -> None:
        """Make a prefilled prompt the last sequence."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed every sequence a token; logits ``[sequences, vocabulary]``."""
        ...

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        """Drop a sequence; the last one takes its number. Its state is kept under ``ids``, where given."""
        ...

    def reset(self) -> None:
        """Drop everything."""
        ...


class Forward:
    """The model's forward pass with those inputs alone that it takes, counted."""

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
        """Logits ``[rows, vocabulary]`` of the last position, and the cache."""
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        inputs[self.cache_name] = cache
        self.passes += 1
        result = self.model.forward(input_ids=ids, use_cache=True, **inputs)
        return result.logits[:, -1], getattr(result, self.cache_name)


def on_device(media: Media, model: ChatModel) -> dict[str, Tensor]:
    """Media where the model is, pictures in its type."""
    dtype = next(model.module.parameters()).dtype
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else None)
        for name, tensor in (media or {}).items()
    }

"""The model as the scheduler sees it, its forward pass, and a runner that decodes one sequence at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ollama_forge.models.chat_model import ChatModel
from ollama_forge.serving.engine.prefix_cache import PrefixCache

Media = Mapping[str, Tensor] | None


class Prefill(Protocol):
    """The prefill of some prompts. ``tokens`` is the number of tokens that it computes, without padding."""

    @property
    def tokens(self) -> int: ...

    def advance(self) -> Tensor | None:
        """Run the next chunk; the last chunk returns the logits ``[prompts, vocabulary]`` of the last positions."""
        ...


class ModelRunner(Protocol):
    """The decode batch: its sequences are rows, numbered from 0 without gaps."""

    @property
    def slots(self) -> int: ...

    def uncached(self, prompt: Sequence[int]) -> int:
        """Number of tokens of a prompt that the prefix cache does not cover."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> Prefill:
        """Start to prefill prompts; with ``media``, one prompt, which does not use the prefix cache."""
        ...

    def join(self, prefill: Any, index: int) -> None:
        """Append the prefilled prompt number ``index`` to the batch as its last row."""
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


class SinglePrefill:
    """Prefills one prompt in a single forward pass; ``cache`` already covers its first ``cached`` tokens."""

    def __init__(self, forward: Forward, prompt: Sequence[int], cache: Any, cached: int, media: Media) -> None:
        self.forward, self.prompt, self.cache, self.cached = forward, prompt, cache, cached
        self.media = on_device(media, forward.model)
        self.tokens = len(prompt) - cached

    def advance(self) -> Tensor | None:
        ids = torch.tensor([list(self.prompt[self.cached :])], device=self.forward.device)
        logits, self.cache = self.forward(ids, self.cache, **self.media)
        return logits


class SingleRunner:
    """Decodes one sequence at a time, for models whose state cannot be batched (linear attention, state spaces).

    The next prompt reuses the state of the last sequence if it begins with the whole sequence.
    """

    slots = 1

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.prefixes: PrefixCache[Any] = PrefixCache(1, 1)
        self.cache: Any = None
        self.length = 0

    def uncached(self, prompt: Sequence[int]) -> int:
        return len(prompt)  # with one slot, no two prompts are prefilled together

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> SinglePrefill:
        (prompt,) = prompts
        found = self.prefixes.match(prompt, whole=True) if media is None else None
        self.prefixes.clear()  # the forward pass changes the state in place
        cache, cached = found if found is not None else (None, 0)
        return SinglePrefill(self.forward, prompt, cache, cached, media)

    def join(self, prefill: SinglePrefill, index: int) -> None:
        self.cache, self.length = prefill.cache, len(prefill.prompt)

    def step(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], device=self.forward.device)
        logits, self.cache = self.forward(ids, self.cache)
        self.length += 1
        return logits

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        if ids is not None:
            self.prefixes.add(ids[: self.length], self.cache, 0)
        self.cache = None

    def reset(self) -> None:
        self.cache = None
        self.prefixes.clear()

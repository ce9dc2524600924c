"""Runners that decode one sequence at a time, for models whose state cannot be batched, or not be used at all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ollama_forge.models.device import upload
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.model_runner import Forward, Media, chunk_of, on_device
from ollama_forge.serving.engine.prefix_cache import PrefixCache


class SinglePrefill:
    """Prefills one prompt in chunks; ``cache`` already covers its first ``cached`` tokens. Images take one pass."""

    def __init__(
        self, forward: Forward, prompt: Sequence[int], cache: Any, cached: int, chunk: int, media: Media
    ) -> None:
        self.forward, self.prompt, self.cache, self.chunk = forward, prompt, cache, chunk
        self.media = on_device(media, forward.model)
        self.cached, self.done = [cached], cached
        self.offset = 0

    def advance(self) -> Tensor | None:
        start = self.done
        end = len(self.prompt) if self.media else min(len(self.prompt), start + self.chunk)
        ids = torch.tensor([list(self.prompt[start:end])], device=self.forward.device)
        inputs: dict[str, Any] = dict(self.media)
        if not self.media:  # behind images, the model finds the positions
            inputs["position_ids"] = torch.arange(start, end, device=ids.device)[None]
        logits, self.cache = self.forward(ids, self.cache, **inputs)
        self.offset = self.forward.take_offset()
        self.done = end
        return logits if end == len(self.prompt) else None


class SingleRunner:
    """Decodes one sequence at a time, for models whose state cannot be batched (linear attention, state spaces).

    The next prompt reuses the state of the last sequence if it begins with the whole sequence.

    Args:
        splits: whether prompts may be prefilled in chunks.
        reuses: whether the state of the last sequence may be continued.
    """

    slots = 1
    runs_ahead = False  # a state that has seen a token too many cannot be continued

    def __init__(self, forward: Forward, *, splits: bool = True, reuses: bool = True) -> None:
        self.forward, self.reuses = forward, reuses
        self.chunk = chunk_of(forward.device) if splits else sys.maxsize
        self.prefixes: PrefixCache[Any] = PrefixCache(1, 1)
        self.cache: Any = None
        self.length = self.offset = 0

    def uncached(self, prompt: Sequence[int]) -> int:
        return len(prompt)  # with one slot, no two prompts are prefilled together

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> SinglePrefill:
        (prompt,) = prompts
        found = self.prefixes.match(prompt, whole=True) if media is None else None
        self.prefixes.clear()  # the forward pass changes the state in place
        cache, cached = found if found is not None else (None, 0)
        return SinglePrefill(self.forward, prompt, cache, cached, self.chunk, media)

    def join(self, prefill: SinglePrefill, index: int) -> None:
        self.cache, self.length, self.offset = prefill.cache, len(prefill.prompt), prefill.offset

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = upload([list(tokens)], self.forward.device)
        positions = upload([[self.length + self.offset]], ids.device)
        logits, self.cache = self.forward(ids, self.cache, position_ids=positions)
        self.length += 1
        return logits

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        if ids is not None and self.reuses:
            self.prefixes.add(ids[: self.length], self.cache, 0)
        self.cache = None

    def reset(self) -> None:
        self.cache = None
        self.prefixes.clear()


class UncachedPrefill:
    """Runs a whole prompt in one pass."""

    def __init__(self, forward: Forward, prompt: Sequence[int]) -> None:
        self.forward, self.prompt, self.cached = forward, prompt, [0]

    def advance(self) -> Tensor | None:
        ids = torch.tensor([list(self.prompt)], device=self.forward.device)
        return self.forward.uncached(ids)[:, -1]


class UncachedRunner:
    """Decodes one sequence at a time with a pass over the whole text for each token. It takes no images."""

    slots = 1
    chunk = sys.maxsize
    reuses = runs_ahead = False

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.ids: list[int] = []

    def uncached(self, prompt: Sequence[int]) -> int:
        return len(prompt)

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> UncachedPrefill:
        (prompt,) = prompts
        if media is not None:
            raise EngineError("this model's cache cannot be used, and images need it")
        return UncachedPrefill(self.forward, prompt)

    def join(self, prefill: UncachedPrefill, index: int) -> None:
        self.ids = list(prefill.prompt)

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        self.ids += tokens
        ids = upload([self.ids], self.forward.device)
        return self.forward.uncached(ids)[:, -1]

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        self.ids = []

    def reset(self) -> None:
        self.ids = []

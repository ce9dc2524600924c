"""The runner for models whose state cannot be batched (linear attention, state spaces): one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ollama_forge.serving.engines.prefixes import Prefixes
from ollama_forge.serving.engines.runner import Forward, Media, on_device


class AlonePrefill:
    """Prefills one prompt in a single forward pass; ``cache`` already covers its first ``known`` tokens."""

    def __init__(self, forward: Forward, prompt: Sequence[int], cache: Any, known: int, media: Media) -> None:
        self.forward, self.prompt, self.cache, self.known = forward, prompt, cache, known
        self.media = on_device(media, forward.model)
        self.tokens = len(prompt) - known

    def advance(self) -> Tensor | None:
        ids = torch.tensor([list(self.prompt[self.known :])], device=self.forward.device)
        logits, self.cache = self.forward(ids, self.cache, **self.media)
        return logits


class AloneRunner:
    """Decodes one sequence. The next prompt reuses its state if the prompt begins with the whole sequence."""

    slots = 1

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.prefixes: Prefixes[Any] = Prefixes(1, 1)
        self.cache: Any = None
        self.length = 0

    def unknown(self, prompt: Sequence[int]) -> int:
        return len(prompt)  # with one slot, no two prompts are prefilled together

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> AlonePrefill:
        (prompt,) = prompts
        found = self.prefixes.longest(prompt, whole=True) if media is None else None
        self.prefixes.clear()  # the forward pass changes the state in place
        cache, known = found if found is not None else (None, 0)
        return AlonePrefill(self.forward, prompt, cache, known, media)

    def join(self, prefill: AlonePrefill, place: int) -> None:
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

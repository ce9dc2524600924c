"""One answer, token by token, over a cache of the conversation so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.models.batching import Ids
from ollama_forge.models.chat_model import ChatModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy. ``num_predict`` -1: as long as the model goes on."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    seed: int | None = None
    num_predict: int = -1


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of ``[vocabulary]`` logits."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    scores = logits.float() / sampling.temperature
    count = min(sampling.top_k, len(scores)) if sampling.top_k > 0 else len(scores)
    values, ids = scores.topk(count)
    shares = values.softmax(-1)
    outside = shares.cumsum(-1) - shares >= sampling.top_p  # the token that crosses top_p stays in
    outside[0] = False
    shares = shares.masked_fill(outside, 0.0).cpu()
    return int(ids[int(torch.multinomial(shares, 1, generator=generator))])


class Conversation:
    """Answers prompts that grow turn by turn; what two prompts share at the start is computed once."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model
        self.cached: Ids = []
        self.cache: object | None = None

    def stream(self, prompt: Ids, sampling: Sampling) -> Iterator[int]:
        """Yield the answer's tokens, without the one that ends it."""
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        ends = set(self.model.eos_ids)
        limit = getattr(self.model.module.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
        room = (limit or 1 << 30) - len(prompt)
        count = room if sampling.num_predict < 0 else min(room, sampling.num_predict)
        feed = prompt
        for _ in range(count):
            token = draw(self._next_logits(feed), sampling, generator)
            if token in ends:
                return
            yield token
            feed = [*self.cached, token]

    @torch.inference_mode()
    def _next_logits(self, ids: Ids) -> Tensor:
        shared = 0
        for a, b in zip(self.cached, ids, strict=False):
            if a != b:
                break
            shared += 1
        shared = min(shared, len(ids) - 1)
        if shared < len(self.cached):
            shared = self._crop(shared)
        new = torch.tensor([ids[shared:]], device=self.model.device)
        result = self.model.forward(input_ids=new, cache=self.cache if shared else None, use_cache=True)
        self.cache, self.cached = result.cache, list(ids)
        logits: Tensor = result.logits[0, -1]
        return logits

    def _crop(self, length: int) -> int:
        """Shorten the cache; where its kind can't be (a sliding window has forgotten), start over."""
        try:
            self.cache.crop(length)  # type: ignore[union-attr]
            return length
        except (AttributeError, ValueError, RuntimeError, NotImplementedError):
            self.cache, self.cached = None, []
            return 0

"""The base model's greedy answers, with the final hidden states that its distributions follow from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo_training.prompts import Conversation

ANSWER_TOKENS = 48  # as many as the answer KL is measured on
BATCH = 32


@dataclass(frozen=True)
class Answered:
    """A prompt with the model's greedy answer.

    Attributes:
        states: bfloat16 ``[answer, d_model]``, the final hidden states that predict the answer's tokens. The head gives
            the logits, which would take 85 times the memory.
    """

    prompt: list[int]
    answer: list[int]
    states: Tensor

    def first(self, tokens: int) -> Answered:
        """The same prompt with the beginning of the answer."""
        return Answered(self.prompt, self.answer[:tokens], self.states[:tokens])


def render(tokenizer: Any, conversation: Conversation) -> str:
    return str(tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, tokenize=False))


class OwnAnswers:
    """Answers by rendered prompt, kept in a file for another run.

    Args:
        model: a causal language model without an adapter.
    """

    def __init__(self, model: Any, tokenizer: Any, path: Path) -> None:
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self._known: dict[str, tuple[list[int], Tensor]] = torch.load(path) if path.is_file() else {}

    def of(self, conversations: Sequence[Conversation]) -> list[Answered]:
        texts = [render(self.tokenizer, conversation) for conversation in conversations]
        ids = {text: self.tokenizer(text, add_special_tokens=False).input_ids for text in texts}
        missing = sorted((text for text in ids if text not in self._known), key=lambda text: len(ids[text]))
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            self._known.update(zip(some, self._answer([ids[text] for text in some]), strict=True))
        if missing:
            torch.save(self._known, self.path)
        return [Answered(ids[text], *self._known[text]) for text in texts]

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        tokens, states, cache = [], [], None
        for _ in range(ANSWER_TOKENS):
            result = self.model.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
            )
            cache = result.cache
            states.append(result.last_hidden_state[:, -1].contiguous())
            tokens.append(self.model.lm_head(states[-1]).argmax(-1))
            ids, positions = tokens[-1].unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out, end = [], self.tokenizer.eos_token_id
        for row, kept in zip(torch.stack(tokens, 1).tolist(), torch.stack(states, 1), strict=True):
            length = row.index(end) + 1 if end in row else len(row)
            out.append((row[:length], kept[:length].clone()))
        return out

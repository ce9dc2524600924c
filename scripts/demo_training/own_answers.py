"""The base model's greedy answers, with the final hidden states that its distributions follow from.

The base says to one in ten harmless requests that it can't do that ("I don't have the capability"). There the answer
is the one that it would give without the first token of that refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from demo_training.passes import Row, exclude
from demo_training.prompts import Conversation
from ollama_forge.evaluation.refusals import AnswerClass, classify

ANSWER_TOKENS = 48  # as many as the answer KL is measured on
BATCH = 32
ATTEMPTS = 4  # answers to a prompt, until one is no refusal


def render(tokenizer: Any, conversation: Conversation) -> str:
    return str(tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, tokenize=False))


class OwnAnswers:
    """Answers by rendered prompt, kept in a file for another run.

    Args:
        model: a causal language model without an adapter.
    """

    def __init__(self, model: Any, tokenizer: Any, path: Path) -> None:
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self._known: dict[str, Row] = torch.load(path, weights_only=False) if path.is_file() else {}

    def of(self, conversations: Sequence[Conversation]) -> list[Row]:
        """The prompts with their answers; prompts that the base refuses at each attempt are left out."""
        texts = [render(self.tokenizer, conversation) for conversation in conversations]
        todo = {text: Row(self._ids(text), 0) for text in texts if text not in self._known}
        for _ in range(ATTEMPTS):
            answered = self._answered(todo)
            refused = {text: row for text, row in answered.items() if self._refuses(row)}
            self._known |= answered
            todo = {
                text: Row(row.ids[: row.prompt], 0, excluded=(*row.excluded, row.ids[row.prompt]))
                for text, row in refused.items()
            }
        if todo:
            torch.save(self._known, self.path)
        rows = [self._known[text] for text in texts]
        return [row for row in rows if not self._refuses(row)]

    def text(self, conversation: Conversation) -> str:
        """The answer to a conversation that ``of`` was given."""
        return self._text(self._known[render(self.tokenizer, conversation)])

    def _text(self, row: Row) -> str:
        return str(self.tokenizer.decode(row.ids[row.prompt :], skip_special_tokens=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _refuses(self, row: Row) -> bool:
        return classify(self._text(row)) in (AnswerClass.REFUSAL, AnswerClass.DEFLECTION)

    def _answered(self, prompts: dict[str, Row]) -> dict[str, Row]:
        ordered = sorted(prompts.items(), key=lambda item: len(item[1].ids))
        out: dict[str, Row] = {}
        for start in range(0, len(ordered), BATCH):
            some = ordered[start : start + BATCH]
            rows = self._answer([row for _, row in some])
            out.update((text, row) for (text, _), row in zip(some, rows, strict=True))
        return out

    @torch.inference_mode()
    def _answer(self, prompts: list[Row]) -> list[Row]:
        width = max(len(row.ids) for row in prompts)
        ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in prompts])
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in prompts])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        tokens, states, cache = [], [], None
        for step in range(ANSWER_TOKENS):
            result = self.model.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
            )
            cache = result.cache
            states.append(result.last_hidden_state[:, -1].contiguous())
            logits = self.model.lm_head(states[-1])
            if step == 0:
                exclude(logits, prompts)
            tokens.append(logits.argmax(-1))
            ids, positions = tokens[-1].unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out, end = [], self.tokenizer.eos_token_id
        for row, answer, kept in zip(prompts, torch.stack(tokens, 1).tolist(), torch.stack(states, 1), strict=True):
            length = answer.index(end) + 1 if end in answer else len(answer)
            ids_of_row = row.ids + answer[:length]
            out.append(replace(row, ids=ids_of_row, prompt=len(row.ids), states=kept[:length].clone()))
        return out

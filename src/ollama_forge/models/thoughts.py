"""Answers behind a thought that could not be closed in the prompt: it runs for a bounded time and is then closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ollama_forge.models.protocol import AnsweringModel, Decided
from ollama_forge.text.closed_thought import Thought, cutting_text
from ollama_forge.text.tokenizer import Ids

THOUGHT_TOKENS = 512
_OPENING_TOKENS = 8  # by then a thought has begun, or none will
_PROBE = "Name a colour."


def settle_thoughts(model: AnsweringModel) -> Thought:
    """Find out by one short answer whether closing the thought in the prompt works, and keep it in the tokenizer.

    A model whose vocabulary alone has marks of thoughts gets an empty one where it would think; one that thinks behind
    a closed thought all the same is left to think.
    """
    tokenizer = model.tokenizer
    while tokenizer.thinking is not None and not tokenizer.thought.must_run:
        answer = model.answer([tokenizer.instruction_ids(_PROBE)], _OPENING_TOKENS).ids[0]
        if not tokenizer.marked_text(answer).lstrip().startswith(tokenizer.thinking.opening):
            break
        tokenizer.thought = Thought.EMPTY if tokenizer.thought is Thought.NONE else Thought.RUNS
    return tokenizer.thought


def behind_thoughts(model: AnsweringModel, prompts: Sequence[Ids]) -> list[Ids]:
    """Prompts, each with the model's own thought at its end, closed after at most 512 tokens.

    Prompts whose thought is closed already come back as they are.
    """
    split, tokenizer = model.tokenizer.thinking, model.tokenizer
    if split is None or not tokenizer.thought.must_run:
        return list(prompts)

    def is_over(ids: Ids) -> bool:
        return split.closing in tokenizer.marked_text(ids)

    cut = tokenizer.backend(cutting_text(split), add_special_tokens=False).input_ids
    out = []
    for prompt, thought in zip(prompts, model.answer(prompts, THOUGHT_TOKENS, decided=is_over).ids, strict=True):
        end = next((count for count in range(1, len(thought) + 1) if is_over(thought[:count])), None)
        out.append([*prompt, *(thought + cut if end is None else thought[:end])])
    return out


def answer_behind_thoughts(
    model: AnsweringModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    *,
    decided: Decided | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Ids]:
    """Greedy answers of at most ``max_new_tokens`` tokens, each counted from behind the thought."""
    return model.answer(behind_thoughts(model, prompts), max_new_tokens, decided=decided, progress=progress).ids

"""Answers of thinking models: if the prompt cannot close the thought, generate a bounded one and close it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ollama_forge.models.protocol import AnsweringModel, Decided
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.text.closed_thought import Moment, Thought, cutting_text
from ollama_forge.text.tokenizer import Ids

THOUGHT_TOKENS = 512
_OPENING_TOKENS = 8  # a thought starts within this many tokens
_PROBE = "Name a colour."


def detect_thought(model: AnsweringModel) -> Thought:
    """Test with short answers whether the model thinks, and set ``tokenizer.thought`` accordingly.

    ``EMPTY`` if the model thinks without an empty thought in the prompt; ``RUNS`` if it thinks even after a closed one.
    """
    tokenizer = model.tokenizer

    def shows(ids: Ids) -> bool:
        """Whether more tokens cannot change what the answer shows."""
        assert tokenizer.thinking is not None
        text = tokenizer.marked_text(ids).lstrip()
        return bool(text) and not tokenizer.thinking.opening.startswith(text)

    while tokenizer.thinking is not None and not tokenizer.thought.must_run:
        answer = model.answer([tokenizer.instruction_ids(_PROBE)], _OPENING_TOKENS, decided=shows)[0]
        if not tokenizer.marked_text(answer).lstrip().startswith(tokenizer.thinking.opening):
            break
        tokenizer.thought = Thought.EMPTY if tokenizer.thought is Thought.NONE else Thought.RUNS
    return tokenizer.thought


def append_thoughts(model: AnsweringModel, prompts: Sequence[Ids]) -> list[Ids]:
    """Append the model's thought to each prompt, closed after at most 512 tokens.

    Prompts of models that do not think or whose prompts close the thought are returned unchanged.
    """
    split, tokenizer = model.tokenizer.thinking, model.tokenizer
    if split is None or not tokenizer.thought.must_run:
        return list(prompts)

    def is_over(ids: Ids) -> bool:
        return split.closing in tokenizer.marked_text(ids)

    cut = tokenizer.backend(cutting_text(split), add_special_tokens=False).input_ids
    out = []
    for prompt, thought in zip(prompts, model.answer(prompts, THOUGHT_TOKENS, decided=is_over), strict=True):
        end = next((count for count in range(1, len(thought) + 1) if is_over(thought[:count])), None)
        out.append([*prompt, *(thought + cut if end is None else thought[:end])])
    return out


def ids_before(model: AnsweringModel, prompts: Sequence[Prompt], moment: Moment) -> list[Ids]:
    """Token ids of each prompt up to the moment."""
    if moment is Moment.THOUGHT:
        return [model.tokenizer.thought_ids(prompt) for prompt in prompts]
    return append_thoughts(model, model.tokenizer.instructions_ids(prompts))


def answer_after_thoughts(
    model: AnsweringModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    *,
    decided: Decided | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Ids]:
    """Greedy answers of at most ``max_new_tokens`` tokens, which begin after the thought."""
    return model.answer(append_thoughts(model, prompts), max_new_tokens, decided=decided, progress=progress)

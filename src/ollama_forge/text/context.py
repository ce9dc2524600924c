"""Leave out the built-in conversations that a model's context does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ollama_forge.prompts.conversation import Conversation
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from ollama_forge.text.tokenizer import Tokenizer

ROOM = 160  # tokens of an answer, and a margin for what an engine adds


def context_of(config: Mapping[str, Any], learned_positions: int | None) -> int | None:
    """The longest text in tokens that a model is made for; None if its config does not say.

    Args:
        config: the content of config.json.
    """
    inner = config.get("text_config")
    said = {**config, **(inner if isinstance(inner, Mapping) else {})}.get("max_position_embeddings")
    known = [value for value in (said, learned_positions) if isinstance(value, int) and value > 0]
    return min(known, default=None)


def fitting(split: PromptSplit, tokenizer: Tokenizer, context: int | None) -> PromptSplit:
    """The split without conversations that are too long for the context; a note says how many they are."""
    if context is None:
        return split
    left_out = 0

    def fits(prompts: tuple[Conversation, ...]) -> tuple[Conversation, ...]:
        nonlocal left_out
        kept = tuple(prompt for prompt in prompts if tokenizer.length(prompt) + ROOM <= context)
        left_out += len(prompts) - len(kept)
        return kept

    def part(found: PartPrompts) -> PartPrompts:
        general, over_refusal, in_context = map(fits, (found.general, found.over_refusal, found.in_context))
        return replace(found, general=general, over_refusal=over_refusal, in_context=in_context)

    parts = {"fit": part(split.fit), "select": part(split.select), "report": part(split.report)}
    note = f"{left_out} conversations are left out: the model's context of {context:,} tokens is too short for them"
    return replace(split, **parts, notes=(*split.notes, *([note] if left_out else [])))

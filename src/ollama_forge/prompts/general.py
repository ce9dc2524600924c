"""The conversations in the package data: general ones in three parts, and two lists that only the report measures.

A fit that protects harmless inputs protects what it sees, and damage is measured where users live: the general list
holds varied requests of many kinds, some with a system prompt, several turns, or in other languages.
"""

from __future__ import annotations

from functools import cache

from ollama_forge.prompts.conversation import Conversation, read_conversations
from ollama_forge.prompts.curated import DATA
from ollama_forge.prompts.normalise import normalise
from ollama_forge.prompts.part import Part, share_of_key

GENERAL_FILE = DATA / "general.jsonl"
OVER_REFUSAL_FILE = DATA / "over_refusal.jsonl"
IN_CONTEXT_FILE = DATA / "harmful_in_context.jsonl"
SECOND_TURN = "second turn"  # the kinds of ``in_context_prompts``
SYSTEM_PROMPT = "system prompt"


@cache
def general_prompts() -> tuple[Conversation, ...]:
    """All general conversations, in file order."""
    return read_conversations(GENERAL_FILE)


def general_part(part: Part) -> tuple[Conversation, ...]:
    """The general conversations of a part: 40 % of them in fit, 20 % in select, 40 % in report, by a stable hash."""
    return tuple(prompt for prompt in general_prompts() if part_of_general(prompt) is part)


def part_of_general(prompt: Conversation) -> Part:
    share = share_of_key(f"general:{normalise(prompt.text)}")
    if share < 0.4:
        return Part.FIT
    return Part.SELECT if share < 0.6 else Part.REPORT


@cache
def over_refusal_prompts() -> tuple[Conversation, ...]:
    """Safe prompts that sound unsafe."""
    return read_conversations(OVER_REFUSAL_FILE)


@cache
def in_context_prompts() -> tuple[Conversation, ...]:
    """Harmful requests in a second turn or under a system prompt."""
    return read_conversations(IN_CONTEXT_FILE)

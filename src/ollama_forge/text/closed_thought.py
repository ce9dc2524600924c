"""Prompts that a model answers without thinking first: they switch thinking off, or close the thought.

Directions and measurements are about the answer, and the first 64 tokens of a thought say nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from ollama_forge.text.template import SWITCHES, Template
from ollama_forge.text.thinking import ThinkingSplit


class Moment(StrEnum):
    """The token before which a prompt ends."""

    ANSWER = "answer"  # the first one of the answer
    THOUGHT = "thought"  # the first one of the thought


class Thought(StrEnum):
    """How prompts deal with the thought before an answer; the value is the note that the program prints."""

    NONE = "this model has no tags for thoughts"
    SWITCHED_OFF = "the chat template switches thinking off"
    EMPTY = "each prompt ends with an empty thought"
    CLOSED = "each prompt closes the thought that the chat template opens"
    FINAL_CHANNEL = "each prompt ends with the header of the final channel"
    LEFT_OPEN = "--template-kwargs switch thinking on: a thought is closed after at most 512 tokens"
    RUNS = "the model thinks even after a closed thought: its new thought is closed after at most 512 tokens"

    @property
    def must_run(self) -> bool:
        """Whether the model writes a thought before each answer."""
        return self in (Thought.LEFT_OPEN, Thought.RUNS)


def thought_of(template: Template, off: str, on: str, template_kwargs: Mapping[str, Any]) -> Thought:
    """Choose how prompts with this chat template deal with the thought.

    Args:
        off, on: a prompt rendered with the template's thinking switches off and on.
        template_kwargs: the user's arguments for the template.
    """
    split = template.thinking
    if split is None:
        return Thought.NONE
    if any(template_kwargs.get(switch) for switch in SWITCHES):
        return Thought.LEFT_OPEN
    if split.channels:
        return Thought.FINAL_CHANNEL
    if off.rstrip().endswith(split.opening):
        return Thought.CLOSED
    if off.rstrip().endswith(split.closing) or off != on:
        return Thought.SWITCHED_OFF
    return Thought.EMPTY


def closing_text(split: ThinkingSplit, prompt: str) -> str:
    """The text that closes the thought at the end of a rendered prompt, or adds an empty one; "" if it is closed."""
    end = prompt.rstrip()
    if split.channels:
        return "" if end.endswith(split.closing) else split.closing
    if end.endswith(split.closing):
        return ""
    if end.endswith(split.opening):
        return ("\n" if prompt.endswith("\n") else "\n\n") + f"{split.closing}\n\n"
    return f"{split.opening}\n\n{split.closing}\n\n"


def opening_text(split: ThinkingSplit, prompt: str) -> str:
    """The text that opens a thought at the end of a rendered prompt that closes none; "" if it is open."""
    if prompt.rstrip().endswith(split.opening):
        return ""
    return split.opening if split.channels else f"{split.opening}\n"


def cutting_text(split: ThinkingSplit) -> str:
    """The text that closes a thought which has reached its maximum length."""
    if split.channels:
        return f"<|end|><|start|>assistant{split.closing}"
    return f"\n{split.closing}\n\n"

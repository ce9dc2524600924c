"""Prompts that a model answers without thinking first: its thought is switched off, or closed before it begins.

What is computed and measured is the answer. 64 tokens of a thought say nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from ollama_forge.text.template import SWITCHES, Template
from ollama_forge.text.thinking import ThinkingSplit


class Thought(StrEnum):
    """What is done about the thought before an answer; the value is what a reader is told."""

    NONE = "this model marks no thoughts"
    SWITCHED_OFF = "the chat template switches thoughts off"
    EMPTY = "an empty thought stands in each prompt"
    CLOSED = "the thought that the chat template opens is closed in each prompt"
    FINAL_CHANNEL = "each prompt ends with the header of the final channel"
    LEFT_OPEN = "thoughts were asked for: each runs for at most 512 tokens, then it is closed"
    RUNS = "the model thinks all the same: each thought runs for at most 512 tokens, then it is closed"

    @property
    def must_run(self) -> bool:
        """Whether answers begin behind a thought that the model writes itself."""
        return self in (Thought.LEFT_OPEN, Thought.RUNS)


def thought_of(template: Template, off: str, on: str, template_kwargs: Mapping[str, Any]) -> Thought:
    """What is to be done about the thought of a model with this chat template.

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
    """What closes the thought at the end of a rendered prompt, or stands for an empty one; "" where it is closed."""
    end = prompt.rstrip()
    if split.channels:
        return "" if end.endswith(split.closing) else split.closing
    if end.endswith(split.closing):
        return ""
    if end.endswith(split.opening):
        return ("\n" if prompt.endswith("\n") else "\n\n") + f"{split.closing}\n\n"
    return f"{split.opening}\n\n{split.closing}\n\n"


def cutting_text(split: ThinkingSplit) -> str:
    """What closes a thought that has run for long enough."""
    if split.channels:
        return f"<|end|><|start|>assistant{split.closing}"
    return f"\n{split.closing}\n\n"

"""The thought before an answer: the tags around it, and splitting it from the answer as text arrives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ollama_forge.text.stops import held_back

_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<reasoning>", "</reasoning>"),
)


@dataclass(frozen=True)
class ThinkingSplit:
    """The tags around a thought.

    Attributes:
        opening, closing: the tags before and after the thought.
        opened: the prompt already ends with the opening tag.
        channels: thinking, tool calls and content are channels of gpt-oss's harmony format.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    opened: bool = False
    channels: bool = False

    @property
    def markers(self) -> str:
        """All tags of the format that may be special tokens of a vocabulary, joined."""
        if self.channels:
            return "<|start|><|channel|><|message|><|constrain|><|end|><|call|><|return|>"
        return self.opening + self.closing

    def after(self, prompt: str) -> ThinkingSplit | None:
        """The split for the answer to ``prompt``; None if the prompt ends with a closed thought."""
        end = prompt.rstrip()
        return None if end.endswith(self.closing) else replace(self, opened=end.endswith(self.opening))


HARMONY = ThinkingSplit("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", channels=True)


def thinking_of_vocabulary(tokens: Collection[str]) -> ThinkingSplit | None:
    """The tags for thoughts that a vocabulary has as tokens, or None."""
    return next((ThinkingSplit(*tags) for tags in _TAGS if tags[0] in tokens and tags[1] in tokens), None)


def thinking_of(template: str) -> ThinkingSplit | None:
    """The tags for thoughts in a chat template, or None."""
    if "<|channel|>analysis" in template:
        return HARMONY
    return next((ThinkingSplit(*tags) for tags in _TAGS if tags[1] in template), None)


class ThoughtSplitter:
    """Splits text into ``(thinking, content)`` as it arrives, and removes the tags and the white space around them."""

    def __init__(self, split: ThinkingSplit) -> None:
        self._split = split
        self._state = "thought begins" if split.opened else "before"
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        if self._state == "answer":
            return "", text
        self._held += text
        if self._state == "before" and not self._look_for_opening():
            return "", self._release() if self._state == "answer" else ""
        if self._state == "thought begins":
            self._held = self._held.lstrip()
            if not self._held:
                return "", ""
            self._state = "thought"
        thinking = self._take_thought() if self._state == "thought" else ""
        return thinking, self._begin_answer() if self._state == "answer begins" else ""

    def end(self) -> tuple[str, str]:
        """The text that was held back, as ``(thinking, content)``."""
        held = self._release()
        return (held, "") if self._state == "thought" else ("", held if self._state == "before" else "")

    def _look_for_opening(self) -> bool:
        """Whether the thought has begun; if none can begin any more, the text is the answer."""
        text, opening = self._held.lstrip(), self._split.opening
        if text.startswith(opening):
            self._held, self._state = text[len(opening) :], "thought begins"
            return True
        if not opening.startswith(text):
            self._state = "answer"
        return False

    def _take_thought(self) -> str:
        closing = self._split.closing
        place = self._held.find(closing)
        if place >= 0:
            thinking, self._held = self._held[:place].rstrip(), self._held[place + len(closing) :]
            self._state = "answer begins"
            return thinking
        certain = self._held[: len(self._held) - held_back(self._held, closing)].rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def _begin_answer(self) -> str:
        self._held = self._held.lstrip()
        if not self._held:
            return ""
        self._state = "answer"
        return self._release()

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held

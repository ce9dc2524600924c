"""The thought before an answer: which tags a template knows, and splitting it off as text arrives."""

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
    """Between which texts a thought stands.

    Attributes:
        opened: the prompt already holds the opening one.
        channels: thought, calls and answer are channels of gpt-oss's harmony format.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    opened: bool = False
    channels: bool = False

    @property
    def markers(self) -> str:
        """All texts of the form that may be special tokens of a vocabulary."""
        if self.channels:
            return "<|start|><|channel|><|message|><|constrain|><|end|><|call|><|return|>"
        return self.opening + self.closing

    def after(self, prompt: str) -> ThinkingSplit | None:
        """The split of an answer to ``prompt``; None where the thought ended there."""
        end = prompt.rstrip()
        return None if end.endswith(self.closing) else replace(self, opened=end.endswith(self.opening))


HARMONY = ThinkingSplit("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", channels=True)


def thinking_of_vocabulary(tokens: Collection[str]) -> ThinkingSplit | None:
    """How thoughts are marked in a vocabulary that has tokens for it; None: it has none."""
    return next((ThinkingSplit(*tags) for tags in _TAGS if tags[0] in tokens and tags[1] in tokens), None)


def thinking_of(template: str) -> ThinkingSplit | None:
    """How a chat template marks thoughts; None: it knows none."""
    if "<|channel|>analysis" in template:
        return HARMONY
    return next((ThinkingSplit(*tags) for tags in _TAGS if tags[1] in template), None)


class ThoughtSplitter:
    """Splits ``(thinking, content)`` off a text as it arrives, without the tags and the white space around them."""

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
        """What was held back."""
        held = self._release()
        return (held, "") if self._state == "thought" else ("", held if self._state == "before" else "")

    def _look_for_opening(self) -> bool:
        """Whether the thought has begun; where none can begin any more, what there is is the answer."""
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

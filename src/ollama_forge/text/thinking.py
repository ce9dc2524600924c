"""The thought before an answer: the tags around it, and splitting it from the answer as text arrives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, auto

from ollama_forge.text.stops import held_back


@dataclass(frozen=True)
class ThinkingSplit:
    """The tags around a thought.

    Attributes:
        opening, closing: the tags before and after the thought.
        opened: the prompt already ends with the opening tag.
        channels: thinking, tool calls and content are channels of gpt-oss's harmony format.
        closes_only: an answer may begin with a thought that has no opening tag.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    opened: bool = False
    channels: bool = False
    closes_only: bool = False

    @property
    def markers(self) -> str:
        """All tags of the format that may be special tokens of a vocabulary, joined."""
        if self.channels:
            return "<|start|><|channel|><|message|><|constrain|><|end|><|call|><|return|>"
        return self.opening + self.closing

    @property
    def answer_after(self) -> tuple[str, ...]:
        """The texts behind which the answer begins, in the order in which they come.

        Between the two of harmony, a header may name a type: ``<|channel|>final <|constrain|>json<|message|>``.
        """
        return ("<|channel|>final", "<|message|>") if self.channels else (self.closing,)

    def after(self, prompt: str) -> ThinkingSplit | None:
        """The split for the answer to ``prompt``; None if the prompt ends with a closed thought."""
        end = prompt.rstrip()
        return None if end.endswith(self.closing) else replace(self, opened=end.endswith(self.opening))


HARMONY = ThinkingSplit("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", channels=True)
_SPLITS = (
    ThinkingSplit("<|channel>thought", "<channel|>"),  # Gemma 4
    ThinkingSplit("<seed:think>", "</seed:think>"),
    ThinkingSplit("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ThinkingSplit("<|thought_start|>", "<|thought_end|>"),  # MiniCPM 3
    ThinkingSplit("[THINK]", "[/THINK]"),  # Magistral
    ThinkingSplit("◁think▷", "◁/think▷"),  # Kimi-VL
    ThinkingSplit("<think>", "</think>"),
    ThinkingSplit("<thought>", "</thought>"),  # EXAONE Deep
    ThinkingSplit("<reasoning>", "</reasoning>"),
    ThinkingSplit("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)


def thinking_of_vocabulary(tokens: Collection[str]) -> ThinkingSplit | None:
    """The tags for thoughts that a vocabulary has as tokens, or None."""
    return next((split for split in _SPLITS if split.opening in tokens and split.closing in tokens), None)


def thinking_of(template: str) -> ThinkingSplit | None:
    """The tags for thoughts in a chat template, or None.

    A template that has only the closing tag, to leave thoughts out of earlier turns, is one of a model whose prompts
    ended with the opening tag in training.
    """
    if "<|channel|>analysis" in template:
        return HARMONY
    split = next((split for split in _SPLITS if split.closing in template), None)
    return replace(split, closes_only=split.opening not in template) if split else None


class _State(Enum):
    BEFORE = auto()  # nothing but white space, or the beginning of the opening tag
    UNDECIDED = auto()  # a thought without an opening tag, or an answer
    THOUGHT_BEGINS = auto()
    THOUGHT = auto()
    ANSWER_BEGINS = auto()
    ANSWER = auto()


class ThoughtSplitter:
    """Splits text into ``(thinking, content)`` as it arrives, and removes the tags and the white space around them.

    If a thought may have no opening tag, a text that begins without one is held back until the closing tag or the end
    tells what it was.
    """

    def __init__(self, split: ThinkingSplit) -> None:
        self._split = split
        self._state = _State.THOUGHT_BEGINS if split.opened else _State.BEFORE
        self._held = ""
        self._searched = 0  # characters of an undecided text that hold no closing tag

    def feed(self, text: str) -> tuple[str, str]:
        if self._state is _State.ANSWER:
            return "", text
        self._held += text
        if self._state is _State.BEFORE:
            self._look_for_opening()
        if self._state is _State.UNDECIDED:
            self._look_for_closing()
        if self._state is _State.THOUGHT_BEGINS:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.THOUGHT
        thinking = self._take_thought() if self._state is _State.THOUGHT else ""
        if self._state is _State.ANSWER_BEGINS:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.ANSWER
        return thinking, self._release() if self._state is _State.ANSWER else ""

    def end(self) -> tuple[str, str]:
        """The text that was held back, as ``(thinking, content)``."""
        held = self._release()
        if self._state is _State.THOUGHT:
            return held, ""
        return "", held if self._state in (_State.BEFORE, _State.UNDECIDED) else ""

    def _look_for_opening(self) -> None:
        text, opening = self._held.lstrip(), self._split.opening
        if text.startswith(opening):
            self._held, self._state = text[len(opening) :], _State.THOUGHT_BEGINS
        elif not opening.startswith(text):
            self._state = _State.UNDECIDED if self._split.closes_only else _State.ANSWER

    def _look_for_closing(self) -> None:
        closing = self._split.closing
        if self._held.find(closing, self._searched) >= 0:
            self._state = _State.THOUGHT_BEGINS
        self._searched = max(0, len(self._held) - len(closing) + 1)

    def _take_thought(self) -> str:
        thinking, self._held, closed = _up_to(self._held, self._split.closing)
        if closed:
            self._state = _State.ANSWER_BEGINS
        return thinking

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held


def _up_to(text: str, closing: str) -> tuple[str, str, bool]:
    """The text before a closing tag without white space at its end, the text behind the tag, and whether there is one.

    Without the tag, the first is what cannot belong to it or to the white space before it, and the second the rest.
    """
    before, found, behind = text.partition(closing)
    if found:
        return before.rstrip(), behind, True
    certain = text[: len(text) - held_back(text, closing)].rstrip()
    return certain, text[len(certain) :], False


class AnswerTags:
    """Removes the tags that some models put around an answer, as text arrives, and the white space inside them.

    The tags are removed only if the answer begins with the opening one.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self._opening, self._closing = opening, closing
        self._looked = self._inside = self._begun = False
        self._held = ""

    def feed(self, text: str) -> str:
        self._held += text
        if not self._looked:
            begun = self._held.lstrip()
            if begun.startswith(self._opening):
                self._held, self._inside = begun[len(self._opening) :], True
            elif self._opening.startswith(begun):
                return ""
            self._looked = True
        return self._certain() if self._inside else self._release()

    def end(self) -> str:
        """The text that was held back."""
        return self._release()

    def _certain(self) -> str:
        """Release the text up to the closing tag, or to what may begin it."""
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        text, self._held, closed = _up_to(self._held, self._closing)
        if closed:
            self._inside = False
            return text + self._release()
        return text

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held

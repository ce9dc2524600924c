"""What the readers of tool calls share: a call, the text that is being read, and a family as a row of forms."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ollama_forge.serving.requests import ToolCall, Tools

T = TypeVar("T")
_SPACE = re.compile(r"\s*")
_ALPHABET = string.ascii_lowercase + string.digits
NAME = r"[\w.\-:/@]+"  # the pattern of a tool's name where nothing else stands around it
LONGEST_HEAD = 200  # characters of the tag or line that holds a name


class Untyped(str):
    """A value from a form that shows no types: the tool's JSON schema decides what it is."""


@dataclass(frozen=True)
class Call:
    """A tool call as the model wrote it; ``arguments`` is None if it gave none."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class Parsed:
    """The first ``length`` characters of a text are ``calls``; without calls they are content.

    Attributes:
        left_over: directly behind calls they are not even that.
    """

    length: int
    calls: tuple[Call, ...] = ()
    left_over: bool = False


# -- reading a text that is still arriving ----------------------------------------------------------------------------

# A reader is a generator: it yields when it needs more text, and goes on where it stopped, so that each character is
# looked at a bounded number of times. Once the output has ended it no longer yields.
Steps = Generator[None, None, T]


class Held:
    """The text from an opener on, as far as it has arrived.

    Attributes:
        ended: the output is complete.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def add(self, piece: str) -> None:
        text, self.text = self.text, ""  # a text that only one name refers to grows in place
        text += piece
        self.text = text

    def take(self, length: int) -> str:
        """Remove and return the first ``length`` characters."""
        taken, self.text = self.text[:length], self.text[length:]
        return taken

    def find(self, text: str, start: int) -> Steps[int]:
        """The index of ``text``; -1 if the output ends without it."""
        while True:
            place = self.text.find(text, start)
            if place >= 0 or self.ended:
                return place
            start = max(start, len(self.text) - len(text) + 1)
            yield

    def search(self, pattern: re.Pattern[str], start: int, longest: int) -> Steps[re.Match[str] | None]:
        """The first match of a pattern that matches at most ``longest`` characters, whatever follows them."""
        while True:
            found = pattern.search(self.text, start)
            if found or self.ended:
                return found
            start = max(start, len(self.text) - longest + 1)
            yield

    def match(
        self, pattern: re.Pattern[str], start: int, begun: re.Pattern[str] | None = None
    ) -> Steps[re.Match[str] | None]:
        """The match at ``start`` within ``LONGEST_HEAD`` characters.

        Args:
            pattern: it must end in a fixed text, so that what follows cannot change the match.
            begun: matches the texts that the pattern may still match as they grow; None: any text.
        """
        while True:
            end = start + LONGEST_HEAD
            found = pattern.match(self.text, start, end)
            over = self.ended or len(self.text) >= end
            if found or over or (begun and not begun.fullmatch(self.text, start)):
                return found
            yield

    def skip(self, start: int, pattern: re.Pattern[str] = _SPACE) -> Steps[int]:
        """The index behind what ``pattern``, a repeated set of characters, matches at ``start``: white space."""
        while True:
            found = pattern.match(self.text, start)
            start = found.end() if found else start
            if start < len(self.text) or self.ended:
                return start
            yield

    def one_of(self, texts: Sequence[str], start: int) -> Steps[str | None]:
        """Which of ``texts`` begins at ``start``, or None."""
        while True:
            begun = self.text[start : start + max(map(len, texts))]
            for text in texts:
                if begun.startswith(text):
                    return text
            if self.ended or not any(text.startswith(begun) for text in texts):
                return None
            yield


# -- families ---------------------------------------------------------------------------------------------------------

Read = Callable[[Held, Tools], Steps[Parsed]]


@dataclass(frozen=True)
class Form:
    """One way to write calls.

    Attributes:
        opener: the text that calls of this form begin with.
        read: reads the calls at the beginning of a held text, which begins with the opener.
        others: the other texts of the form that may be special tokens of a vocabulary, joined.
        only_first: such calls are read only where the answer begins, or directly behind another call.
    """

    opener: str
    read: Read
    others: str = ""
    only_first: bool = False


JSON_CALL = '{"name": "NAME", "arguments": '  # the usual opening of a call


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written whose arguments are a JSON object.

    Attributes:
        opening, closing: the texts around the arguments; in ``opening``, NAME stands for the tool's name.
        begin, separator, end: the texts before the first call, between two, and after the last.
        several: whether more than one call can be written.
        template_mark: a text that the chat template must contain; "" for any template.
        thought: the texts around a thought that may come before, where it is part of the format.
    """

    opening: str
    closing: str = ""
    begin: str = ""
    separator: str = ""
    end: str = ""
    several: bool = True
    template_mark: str = ""
    thought: tuple[str, str] | None = None

    def opening_of(self, name: str) -> str:
        """The text before the arguments of a call of the tool ``name``."""
        if '"NAME"' in self.opening:
            return self.opening.replace('"NAME"', json.dumps(name, ensure_ascii=False))
        return self.opening.replace("NAME", name)


@dataclass(frozen=True)
class ToolFamily:
    """The tool call format of a family of models.

    Attributes:
        template_marks: how the family is known: a chat template has all texts of one of these groups.
        forms: how its models write calls.
        written: how its models are made to write calls, where that is JSON between texts: the first whose mark the
            chat template has. Without any, they are made to write plain JSON.
        answer_tags: tags that its models may put around an answer.
        call_id: the id of a call as the template wants it, from the call's id, the tool's name, and the call's number
            in the conversation (None: the call is not there). None: any id will do.
    """

    name: str
    template_marks: tuple[tuple[str, ...], ...]
    forms: tuple[Form, ...]
    written: tuple[CallSyntax, ...] = ()
    answer_tags: tuple[str, str] | None = None
    call_id: Callable[[str, str, int | None], str] | None = None

    def matches(self, template: str) -> bool:
        """Whether a chat template uses this format."""
        return any(all(mark in template for mark in marks) for marks in self.template_marks)

    @property
    def markers(self) -> str:
        """All texts of the format that may be special tokens of a vocabulary, joined."""
        return "".join(form.opener + form.others for form in self.forms)


class CallNumbers:
    """Assigns ids (``call_`` and eight characters) and indices to the tool calls of one output."""

    def __init__(self) -> None:
        self._count = 0

    def number(self, calls: Iterable[Call]) -> tuple[ToolCall, ...]:
        """The calls with ids and with the next indices."""
        made = tuple(ToolCall(_new_id(), self._count + n, c.name, c.arguments or {}) for n, c in enumerate(calls))
        self._count += len(made)
        return made


def _new_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(8))

"""The tool call format of a family of models, and extracting calls from text as it arrives."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.requests import ToolCall
from ollama_forge.text.stops import held_back

_BETWEEN = re.compile(r"[\s;,]*")  # separators between two calls
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Call:
    """A tool call as the model wrote it."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Parsed:
    """The first ``length`` characters of a text are ``calls``; without calls they are content."""

    length: int
    calls: tuple[Call, ...] = ()


# Reads calls at the start of a text, which begins with one of the family's openers; the flag says whether the output
# has ended. Text behind the parsed part must not change the result. None: more text is needed; if the output has
# ended, the opener is content.
Read = Callable[[str, bool], Parsed | None]


@dataclass(frozen=True)
class ToolFamily:
    """The tool call format of a family of models.

    Attributes:
        template_marks: how the family is known: a chat template has all texts of one of these groups.
        openers: the texts that a call or a block of calls may begin with.
        markers: all texts of the format that may be special tokens of a vocabulary, joined.
        read: reads the calls behind an opener.
    """

    name: str
    template_marks: tuple[tuple[str, ...], ...]
    openers: tuple[str, ...]
    markers: str
    read: Read

    def matches(self, template: str) -> bool:
        """Whether a chat template uses this format."""
        return any(all(mark in template for mark in marks) for marks in self.template_marks)


class CallNumbers:
    """Assigns ids (``call_`` and eight characters) and indices to the tool calls of one output."""

    def __init__(self) -> None:
        self._count = 0

    def number(self, calls: Iterable[Call]) -> tuple[ToolCall, ...]:
        """The calls with ids and with the next indices."""
        made = tuple(ToolCall(_new_id(), self._count + n, c.name, c.arguments) for n, c in enumerate(calls))
        self._count += len(made)
        return made


def _new_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(8))


class ToolCallParser:
    """Extracts the calls of known tools from a text as it arrives; the rest stays unchanged content.

    White space around calls is removed, unless content stands on both sides of them.
    """

    _CLOSERS = frozenset("}])>`\n;")
    _SHORT = 64  # a longer held text is read again only when new text contains a closer

    def __init__(self, family: ToolFamily, names: Sequence[str]) -> None:
        self._family, self._names = family, frozenset(names)
        self._numbers = CallNumbers()
        self._held = ""
        self._space = ""
        self._has_content = self._called = False

    def feed(self, text: str) -> list[str | tuple[ToolCall, ...]]:
        """Pieces of content and calls, in the order of the text."""
        waiting = len(self._held) > self._SHORT
        self._held += text
        return [] if waiting and not self._CLOSERS & set(text) else self._extract(ended=False)

    def end(self) -> list[str | tuple[ToolCall, ...]]:
        """The pieces of the text that was held back."""
        out = self._extract(ended=True)
        if not self._called and self._space:
            out.append(self._space)
        return out

    def _extract(self, ended: bool) -> list[str | tuple[ToolCall, ...]]:
        out: list[str | tuple[ToolCall, ...]] = []
        while self._held:
            start, opener = self._first_opener()
            if opener is None and not ended:
                start -= max(held_back(self._held, known) for known in self._family.openers)
            out += self._content(self._held[:start])
            self._held = self._held[start:]
            if opener is None:
                break
            parsed = self._family.read(self._held, ended)
            if parsed is None and not ended:
                break
            parsed = parsed or Parsed(len(opener))
            if parsed.calls and all(call.name in self._names for call in parsed.calls):
                out.append(self._numbers.number(parsed.calls))
                self._called = True
            else:
                out += self._content(self._held[: parsed.length])
            self._held = self._held[parsed.length :]
        return out

    def _first_opener(self) -> tuple[int, str | None]:
        """Where the first opener begins, and which it is; if several begin there, the longest."""
        met = [(start, -len(o), o) for o in self._family.openers if (start := self._held.find(o)) >= 0]
        if not met:
            return len(self._held), None
        start, _, opener = min(met)
        return start, opener

    def _content(self, text: str) -> list[str | tuple[ToolCall, ...]]:
        """Pieces of content; white space at the end is held back, because a call may follow."""
        text, self._space = self._space + text, ""
        if self._called:
            if _BETWEEN.fullmatch(text):
                self._space = text
                return []
            text = text if self._has_content else text.lstrip()
            self._called = False
        body = text.rstrip()
        self._space = text[len(body) :]
        self._has_content = self._has_content or bool(body)
        return [body] if body else []

"""The interface of tool call formats, and extracting calls from text as it arrives. A new format is one file here."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ollama_forge.serving.events import ToolCall
from ollama_forge.text.stops import held_back

_BETWEEN = re.compile(r"[\s;,]*")  # separators between two calls
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Call:
    """A tool call as the model wrote it."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The first ``length`` characters of a text are ``calls``; without calls they are content."""

    length: int
    calls: tuple[Call, ...] = ()


class ToolFamily(Protocol):
    """The tool call format of one family of models.

    Attributes:
        openers: the texts that a call or a block of calls may begin with.
        markers: all texts of the format that may be special tokens of a vocabulary, joined.
    """

    @property
    def name(self) -> str: ...

    @property
    def openers(self) -> tuple[str, ...]: ...

    @property
    def markers(self) -> str: ...

    def detect(self, template: str) -> bool:
        """Whether a chat template uses this format."""
        ...

    def read(self, text: str, ended: bool) -> Found | None:
        """Read calls at the start of ``text``, which begins with an opener.

        Text that follows the found part does not change the result.

        Returns:
            None if more text is needed; if the answer has ``ended``, the opener then is content.
        """
        ...


def new_id() -> str:
    """A new id of a tool call: ``call_`` and eight characters."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(8))


class Numbered:
    """Assigns ids and indices to the tool calls of one answer."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, calls: Iterable[Call]) -> tuple[ToolCall, ...]:
        made = tuple(ToolCall(new_id(), self._count + n, c.name, c.arguments) for n, c in enumerate(calls))
        self._count += len(made)
        return made


class CallReader:
    """Extracts the calls of known tools from a text as it arrives; the rest stays unchanged content.

    White space around calls is removed, unless content stands on both sides of them.
    """

    _CLOSERS = frozenset("}])>`\n;")
    _SHORT = 64  # a longer held text is read again only when new text contains a closer

    def __init__(self, family: ToolFamily, names: Sequence[str]) -> None:
        self._family, self._names = family, frozenset(names)
        self._number = Numbered()
        self._held = ""
        self._space = ""
        self._has_content = self._called = False

    def feed(self, text: str) -> list[str | tuple[ToolCall, ...]]:
        """Pieces of content and calls, in the order of the text."""
        waiting = len(self._held) > self._SHORT
        self._held += text
        return [] if waiting and not self._CLOSERS & set(text) else self._extract(ended=False)

    def end(self) -> list[str | tuple[ToolCall, ...]]:
        out = self._extract(ended=True)
        if not self._called and self._space:
            out.append(self._space)
        return out

    def _extract(self, ended: bool) -> list[str | tuple[ToolCall, ...]]:
        out: list[str | tuple[ToolCall, ...]] = []
        while self._held:
            place, opener = self._first_opener()
            if opener is None and not ended:
                place -= max(held_back(self._held, known) for known in self._family.openers)
            out += self._content(self._held[:place])
            self._held = self._held[place:]
            if opener is None:
                break
            found = self._family.read(self._held, ended)
            if found is None and not ended:
                break
            found = found or Found(len(opener))
            if found.calls and all(call.name in self._names for call in found.calls):
                out.append(self._number(found.calls))
                self._called = True
            else:
                out += self._content(self._held[: found.length])
            self._held = self._held[found.length :]
        return out

    def _first_opener(self) -> tuple[int, str | None]:
        met = [(place, -len(o), o) for o in self._family.openers if (place := self._held.find(o)) >= 0]
        if not met:
            return len(self._held), None
        place, _, opener = min(met)
        return place, opener

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

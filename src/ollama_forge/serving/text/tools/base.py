"""What a family of tool calls is, and taking calls out of a text as it arrives. A new family is one file here."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ollama_forge.serving.events import ToolCall
from ollama_forge.text.stops import held_back

_BETWEEN = re.compile(r"[\s;,]*")  # what may part two calls
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Call:
    """A call as a model wrote it."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The first ``length`` characters are calls, or, where there are none, text."""

    length: int
    calls: tuple[Call, ...] = ()


class ToolFamily(Protocol):
    """How one family of models writes calls.

    Attributes:
        openers: the texts that a call, or a block of them, may begin with.
        markers: all texts of the form that may be special tokens of a vocabulary.
    """

    @property
    def name(self) -> str: ...

    @property
    def openers(self) -> tuple[str, ...]: ...

    @property
    def markers(self) -> str: ...

    def detect(self, template: str) -> bool:
        """Whether a chat template teaches this form."""
        ...

    def read(self, text: str, ended: bool) -> Found | None:
        """Read what begins with an opener; None: more is needed (never where the answer has ``ended``).

        A text that goes on behind what is found gives the same as one that ends with it.
        """
        ...


def new_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(8))


class Numbered:
    """Gives the calls of one answer their ids and indices."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, calls: Iterable[Call]) -> tuple[ToolCall, ...]:
        made = tuple(ToolCall(new_id(), self._count + n, c.name, c.arguments) for n, c in enumerate(calls))
        self._count += len(made)
        return made


class CallReader:
    """Takes the calls of known tools out of a text; everything else stays text, as it was.

    White space around calls goes with them, but between two pieces of text.
    """

    _CLOSERS = frozenset("}])>`\n;")
    _SHORT = 64  # a text this long is read again only when something in it may have ended

    def __init__(self, family: ToolFamily, names: Sequence[str]) -> None:
        self._family, self._names = family, frozenset(names)
        self._number = Numbered()
        self._held = ""
        self._space = ""
        self._said = self._called = False

    def feed(self, text: str) -> list[str | tuple[ToolCall, ...]]:
        """Pieces of text and calls, in the order they were written."""
        waiting = len(self._held) > self._SHORT
        self._held += text
        return [] if waiting and not self._CLOSERS & set(text) else self._take(ended=False)

    def end(self) -> list[str | tuple[ToolCall, ...]]:
        out = self._take(ended=True)
        if not self._called and self._space:
            out.append(self._space)
        return out

    def _take(self, ended: bool) -> list[str | tuple[ToolCall, ...]]:
        out: list[str | tuple[ToolCall, ...]] = []
        while self._held:
            place, opener = self._opening()
            if opener is None and not ended:
                place -= max(held_back(self._held, known) for known in self._family.openers)
            out += self._say(self._held[:place])
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
                out += self._say(self._held[: found.length])
            self._held = self._held[found.length :]
        return out

    def _opening(self) -> tuple[int, str | None]:
        met = [(place, -len(o), o) for o in self._family.openers if (place := self._held.find(o)) >= 0]
        if not met:
            return len(self._held), None
        place, _, opener = min(met)
        return place, opener

    def _say(self, text: str) -> list[str | tuple[ToolCall, ...]]:
        """Text, but for white space at its end, which may yet turn out to stand before a call."""
        text, self._space = self._space + text, ""
        if self._called:
            if _BETWEEN.fullmatch(text):
                self._space = text
                return []
            text = text if self._said else text.lstrip()
            self._called = False
        body = text.rstrip()
        self._space = text[len(body) :]
        self._said = self._said or bool(body)
        return [body] if body else []

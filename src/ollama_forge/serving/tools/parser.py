"""Extracts tool calls from the text of an answer as it arrives."""

from __future__ import annotations

import re

from ollama_forge.serving.requests import ToolCall, Tools
from ollama_forge.serving.tools.arguments import accepted
from ollama_forge.serving.tools.base import CallNumbers, Form, Held, Parsed, Steps, ToolFamily
from ollama_forge.text.stops import held_back

_BETWEEN = re.compile(r"[\s;,]*")  # separators between two calls
_MOST_FAILURES = 16

Piece = str | tuple[ToolCall, ...]


class ToolCallParser:
    """Extracts the calls of known tools from a text as it arrives; the rest stays unchanged content.

    White space around calls is removed, unless content stands on both sides of them.
    """

    def __init__(self, family: ToolFamily, tools: Tools) -> None:
        self._forms, self._tools = family.forms, tools
        self._numbers = CallNumbers()
        self._held = Held()
        self._reading: Steps[Parsed] | None = None  # the reader at work, at the beginning of the held text
        self._failures = 0  # of readers that read up to the end of the output, each of them in vain
        self._space = ""
        self._has_content = self._called = False

    def feed(self, text: str) -> list[Piece]:
        """Pieces of content and calls, in the order of the text."""
        self._held.add(text)
        return self._extract()

    def end(self) -> list[Piece]:
        """The pieces of the text that was held back."""
        self._held.ended = True
        out = self._extract()
        if not self._called and self._space:
            out.append(self._space)
        return out

    def _extract(self) -> list[Piece]:
        out: list[Piece] = []
        while self._held.text:
            if self._reading is None:
                start, form = self._next_form()
                out += self._content(self._held.take(start))
                if form is None:
                    break
                self._reading = form.read(self._held, self._tools)
            parsed = self._read(self._reading)
            if parsed is None:
                break
            self._reading = None
            calls = [call for found in parsed.calls if (call := accepted(found, self._tools)) is not None]
            if calls and len(calls) == len(parsed.calls):
                self._held.take(parsed.length)
                out.append(self._numbers.number(calls))
                self._called = True
            elif parsed.left_over and self._called:
                self._held.take(parsed.length)
            else:
                self._failures += self._held.ended
                length = parsed.length if self._failures < _MOST_FAILURES else len(self._held.text)
                out += self._content(self._held.take(max(length, 1)))
        return out

    @staticmethod
    def _read(reading: Steps[Parsed]) -> Parsed | None:
        """Go on reading; None: more text is needed."""
        try:
            next(reading)
        except StopIteration as stop:
            parsed: Parsed = stop.value
            return parsed
        return None

    def _next_form(self) -> tuple[int, Form | None]:
        """Where the next calls may begin, and in which form; without a form, the text before that is content."""
        text, ended = self._held.text, self._held.ended
        first = self._first_place(text)
        met = []
        begun = len(text)  # where the first opener begins that is not complete yet
        for form in self._forms:
            if form.only_first:
                if first is None:
                    continue
                rest = text[first:]
                if rest.startswith(form.opener):
                    met.append((first, -len(form.opener), form))
                elif rest and form.opener.startswith(rest):
                    begun = min(begun, first)
            else:
                if (start := text.find(form.opener)) >= 0:
                    met.append((start, -len(form.opener), form))
                begun = min(begun, len(text) - held_back(text, form.opener))
        if met:
            start, _, form = min(met, key=lambda entry: entry[:2])
            if start < begun or ended:
                return start, form
        return (len(text) if ended else begun), None

    def _first_place(self, text: str) -> int | None:
        """Where a call stands first in the answer or directly behind another call; None: it no longer can."""
        if self._called:
            between = _BETWEEN.match(text)
            return between.end() if between else 0
        return None if self._has_content else len(text) - len(text.lstrip())

    def _content(self, text: str) -> list[Piece]:
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

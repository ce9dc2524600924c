"""Plain JSON calls, alone, in a list or in a code block; the format for templates of no other family."""

from __future__ import annotations

import re

from ollama_forge.serving.text.tools.base import Found
from ollama_forge.serving.text.tools.json_calls import BrokenValueError, calls_of, loads, value_end

_FENCE = re.compile(r"```(?:json|tool_call|tool_code)?\s*")
_FENCE_BEGUN = re.compile(r"`{1,3}[a-z_]*\s*")
_VALUE = re.compile(r"\{\s*\"|\[\s*\{\s*\"")
_VALUE_BEGUN = re.compile(r"\{\s*|\[\s*(\{\s*)?")


class Plain:
    """Calls of the form ``{"name": …, "arguments": {…}}``."""

    name = "plain"
    openers = ("```", "{", "[")
    markers = ""

    def detect(self, template: str) -> bool:
        return True

    def read(self, text: str, ended: bool) -> Found | None:
        if text.startswith("`"):
            return self._fenced(text, ended)
        return read_value(text, 0, ended)

    def _fenced(self, text: str, ended: bool) -> Found | None:
        """Read calls in a code block; the fences belong to the calls."""
        fence = _FENCE.match(text)
        start = fence.end() if fence else 0
        if not text.startswith(("{", "["), start):
            return None if _FENCE_BEGUN.fullmatch(text) and not ended else Found(len("```"))
        inner = read_value(text, start, ended)
        if inner is None or not inner.calls:
            return inner
        rest = text[inner.length :].lstrip()
        if rest.startswith("```"):
            return Found(len(text) - len(rest) + len("```"), inner.calls)
        return None if not ended and "```".startswith(rest) else inner


def read_value(text: str, start: int, ended: bool) -> Found | None:
    """Read the object or list at ``start``: calls, or content up to its end; one character if none begins."""
    if not _VALUE.match(text, start):
        return None if not ended and _VALUE_BEGUN.fullmatch(text, start) else Found(start + 1)
    try:
        end = value_end(text, start)
    except BrokenValueError as broken:
        return Found(_line_end(text[: broken.place]))
    if end is None:
        return Found(_line_end(text)) if ended else None
    return Found(end, calls_of(loads(text[start:end])))


def _line_end(text: str) -> int:
    """The end of the line: malformed JSON is content up to there, and a call may follow."""
    place = text.find("\n")
    return place + 1 if place >= 0 else len(text)

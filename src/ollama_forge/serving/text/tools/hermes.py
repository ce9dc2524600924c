"""Hermes and Qwen: ``<tool_call>{…}</tool_call>``, one call per block."""

from __future__ import annotations

import re

from ollama_forge.serving.text.tools.base import Found
from ollama_forge.serving.text.tools.json_calls import BrokenValueError, calls_of, loads, value_end

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BEGIN = re.compile(rf"{_OPEN}\s*")


class Hermes:
    """A JSON object between tags; at the end of an answer the closing tag may be missing."""

    name = "hermes"
    openers = (_OPEN,)
    markers = _OPEN + _CLOSE

    def detect(self, template: str) -> bool:
        return _OPEN in template

    def read(self, text: str, ended: bool) -> Found | None:
        begin = _BEGIN.match(text)
        assert begin is not None
        if not text.startswith(("{", "["), begin.end()):
            return None if begin.end() == len(text) and not ended else Found(len(_OPEN))
        try:
            end = value_end(text, begin.end())
        except BrokenValueError as broken:
            return _text(text[: broken.place])
        if end is None:
            return _text(text) if ended else None
        calls = calls_of(loads(text[begin.end() : end]))
        rest = text[end:].lstrip()
        if rest.startswith(_CLOSE):
            return Found(len(text) - len(rest) + len(_CLOSE), calls)
        if not ended and _CLOSE.startswith(rest):
            return None
        return Found(end, calls)


def _text(broken: str) -> Found:
    """A malformed block is content up to its closing tag; without a closing tag, all of it is."""
    place = broken.find(_CLOSE)
    return Found(place + len(_CLOSE) if place >= 0 else len(broken))

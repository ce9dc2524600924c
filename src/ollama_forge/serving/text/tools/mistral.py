"""Mistral: ``[TOOL_CALLS]`` before a JSON list of calls, or before each call ``name[ARGS]{…}``."""

from __future__ import annotations

import re

from ollama_forge.serving.text.tools.base import Call, Found
from ollama_forge.serving.text.tools.json_calls import BrokenValueError, calls_of, loads, value_end

_OPEN = "[TOOL_CALLS]"
_BEGIN = re.compile(rf"{re.escape(_OPEN)}\s*")
_NAME = re.compile(r"([\w.\-]+)(?:\[CALL_ID\][\w\-]+)?(?:\[ARGS\])?\s*")
_LONGEST_NAME = 200


class Mistral:
    name = "mistral"
    openers = (_OPEN,)
    markers = f"{_OPEN}[ARGS][CALL_ID]"

    def detect(self, template: str) -> bool:
        return _OPEN in template

    def read(self, text: str, ended: bool) -> Found | None:
        begin = _BEGIN.match(text)
        assert begin is not None
        start = begin.end()
        if start == len(text):
            return None
        if text[start] in "{[":
            return self._value(text, start, ended, None)
        brace = text.find("{", start)
        head = text[start : brace if brace >= 0 else len(text)]
        if "\n" in head.strip() or len(head) > _LONGEST_NAME:
            return Found(len(_OPEN))
        if brace < 0:
            return None
        name = _NAME.fullmatch(head)
        return self._value(text, brace, ended, name[1]) if name else Found(len(_OPEN))

    def _value(self, text: str, start: int, ended: bool, name: str | None) -> Found | None:
        try:
            end = value_end(text, start)
        except BrokenValueError as broken:
            return Found(broken.place)
        if end is None:
            return Found(len(text)) if ended else None
        value = loads(text[start:end])
        if name is None:
            return Found(end, calls_of(value))
        return Found(end, (Call(name, value),) if isinstance(value, dict) else ())

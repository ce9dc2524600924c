"""Qwen3-Coder: ``<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>``."""

from __future__ import annotations

import re
from typing import Any

from ollama_forge.serving.text.tools.base import Call, Found
from ollama_forge.serving.text.tools.json_calls import loads

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


class QwenCoder:
    """A parameter that is valid JSON has that value; any other is a string."""

    name = "qwen-coder"
    openers = (_OPEN,)
    markers = _OPEN + _CLOSE

    def detect(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def read(self, text: str, ended: bool) -> Found | None:
        place = text.find(_CLOSE)
        if place < 0 and not ended:
            return None
        inner = text[len(_OPEN) : place if place >= 0 else len(text)]
        return Found(place + len(_CLOSE) if place >= 0 else len(text), _call(inner))


def _call(inner: str) -> tuple[Call, ...]:
    function = _FUNCTION.fullmatch(inner)
    if function is None or _PARAMETER.sub("", function[2]).strip():
        return ()
    return (Call(function[1].strip(), {p[1].strip(): _value(p[2]) for p in _PARAMETER.finditer(function[2])}),)


def _value(spelled: str) -> Any:
    value = loads(spelled)
    return spelled if value is None and spelled.strip() != "null" else value

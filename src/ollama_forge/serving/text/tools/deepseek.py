"""DeepSeek: calls between markers; the arguments are bare JSON (V3.1) or a code block after the name (V3, R1)."""

from __future__ import annotations

import re

from ollama_forge.serving.text.tools.base import Call, Found
from ollama_forge.serving.text.tools.json_calls import loads

_ALL, _END_ALL = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_BEGIN = re.compile(rf"(?:{_ALL}\s*)?{_ONE}")
_BEGUN = re.compile(rf"{_ALL}\s*")
_BLOCK = re.compile(r"\s*([^\n]*?)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


class DeepSeek:
    name = "deepseek"
    openers = (_ALL, _ONE)
    markers = _ALL + _END_ALL + _ONE + _SEP + _END

    def detect(self, template: str) -> bool:
        return "tool▁call" in template

    def read(self, text: str, ended: bool) -> Found | None:
        begin = _BEGIN.match(text)
        if begin is None:
            begun = _BEGUN.match(text)
            waiting = begun is not None and _ONE.startswith(text[begun.end() :])
            return None if waiting else Found(len(_ALL))
        close = text.find(_END, begin.end())
        if close < 0:
            return Found(len(text), _call(text[begin.end() :])) if ended else None
        call = _call(text[begin.end() : close])
        end = close + len(_END)
        rest = text[end:].lstrip()
        if rest.startswith(_END_ALL):
            return Found(len(text) - len(rest) + len(_END_ALL), call)
        if not ended and _END_ALL.startswith(rest):
            return None
        return Found(end, call)


def _call(inner: str) -> tuple[Call, ...]:
    """The call between the markers; empty if it is malformed."""
    head, separator, rest = inner.partition(_SEP)
    block = _BLOCK.fullmatch(rest)
    name, spelled = (block[1], block[2]) if block else (head.strip(), rest)
    arguments = loads(spelled)
    return (Call(name, arguments),) if separator and isinstance(arguments, dict) else ()

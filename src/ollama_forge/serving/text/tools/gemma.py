"""Gemma: Python in a ``tool_code`` block, JSON with or without a code block, or ``call:name{…}`` between markers."""

from __future__ import annotations

import json
import re

from ollama_forge.serving.text.tools.base import Call, Found
from ollama_forge.serving.text.tools.json_calls import loads
from ollama_forge.serving.text.tools.plain import Plain
from ollama_forge.serving.text.tools.python_calls import python_calls

_CODE = "```tool_code"
# opening marker, closing marker, quotation mark of strings
_MARKED = (
    ("<start_function_call>", "<end_function_call>", "<escape>"),
    ("<|tool_call>", "<tool_call|>", '<|"|>'),
)
_CALL = re.compile(r"\s*call:\s*([\w.\-]+)\s*(\{.*\})\s*", re.DOTALL)
_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w\-]*)(\s*:)")


class Gemma:
    name = "gemma"
    openers = (*Plain.openers, *(marks[0] for marks in _MARKED))
    markers = "".join("".join(marks) for marks in _MARKED)

    def __init__(self) -> None:
        self._plain = Plain()

    def detect(self, template: str) -> bool:
        return any(word in template for word in ("<start_of_turn>", "tool_code", *(marks[0] for marks in _MARKED)))

    def read(self, text: str, ended: bool) -> Found | None:
        for opening, closing, quote in _MARKED:
            if text.startswith(opening):
                place = text.find(closing)
                if place < 0 and not ended:
                    return None
                inner = text[len(opening) : place if place >= 0 else len(text)]
                return Found(place + len(closing) if place >= 0 else len(text), _marked_call(inner, quote))
        if text.startswith(_CODE):
            close = text.find("```", len(_CODE))
            if close < 0:
                return Found(len(text)) if ended else None
            code = text[len(_CODE) : close]
            calls = python_calls(code)
            return Found(close + 3, calls) if calls else self._plain.read(text, ended)
        if text.startswith("```") and _CODE.startswith(text) and not ended:
            return None
        return self._plain.read(text, ended)


def _marked_call(inner: str, quote: str) -> tuple[Call, ...]:
    """The call ``call:name{key:value}`` with bare keys and strings between ``quote``; empty if it is malformed."""
    pieces = inner.split(quote)
    plain = [_KEY.sub(r'\1"\2"\3', piece) for piece in pieces[::2]]
    strings = [json.dumps(piece) for piece in pieces[1::2]]
    whole = "".join(piece + string for piece, string in zip(plain, [*strings, ""], strict=False))
    call = _CALL.fullmatch(whole)
    arguments = loads(call[2]) if call else None
    return (Call(call[1], arguments),) if call and isinstance(arguments, dict) else ()

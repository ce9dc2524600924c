"""Llama 3: a JSON object with ``parameters``, with or without ``<|python_tag|>`` before it, or Python after the tag."""

from __future__ import annotations

import re

from ollama_forge.serving.text.tools.base import Found
from ollama_forge.serving.text.tools.plain import read_value
from ollama_forge.serving.text.tools.python_calls import python_calls

_TAG = "<|python_tag|>"
_BEGIN = re.compile(rf"{re.escape(_TAG)}\s*")


class Llama:
    name = "llama"
    openers = (_TAG, "{", "[")
    markers = _TAG

    def detect(self, template: str) -> bool:
        return _TAG in template or "Environment: ipython" in template

    def read(self, text: str, ended: bool) -> Found | None:
        begin = _BEGIN.match(text)
        start = begin.end() if begin else 0
        if start == len(text):
            return Found(start) if ended else None
        if text[start] in "{[":
            return read_value(text, start, ended)
        return Found(len(text), python_calls(text[start:])) if ended else None  # Python runs to the end of the answer

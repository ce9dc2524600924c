"""The harmony format of gpt-oss: messages in channels (analysis, commentary, final); calls go to ``functions.name``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ollama_forge.serving.requests import Delta
from ollama_forge.serving.tools.base import Call, CallNumbers
from ollama_forge.serving.tools.payloads import loads
from ollama_forge.text.stops import held_back

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")


class HarmonyParser:
    """Reads thinking, content and tool calls from messages with headers; text without a header is content.

    Args:
        names: the tools that may be called; a call of another tool is content.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._numbers = CallNumbers()
        self._held = ""
        self._in_header = True
        # the message whose body is being read: its header, whether it is thinking, and the tool that it calls
        self._header = ""
        self._is_thinking = False
        self._tool: str | None = None

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        out: list[Delta] = []
        while (self._read_header() if self._in_header else self._read_body(out)) and self._held:
            pass
        return out

    def end(self) -> list[Delta]:
        out: list[Delta] = []
        if not self._in_header:
            self._finish(out, self._held)
        elif not self._held.startswith("<|"):
            self._add(out, self._held)
        self._held = ""
        return out

    def _read_header(self) -> bool:
        """Read the header of a message; return whether it is complete."""
        begins = (_CHANNEL, _START, _MESSAGE)
        if not any(self._held.startswith(mark) or mark.startswith(self._held) for mark in begins):
            self._in_header = self._is_thinking = False  # no header: the prompt began the message
            return True
        end = self._held.find(_MESSAGE)
        if end < 0:
            return False
        end += len(_MESSAGE)
        self._header, self._held = self._held[:end], self._held[end:]
        self._in_header = False
        channel, recipient = _CHANNEL_NAME.search(self._header), _RECIPIENT.search(self._header)
        self._is_thinking = channel is not None and channel[1] == "analysis"
        self._tool = recipient[1] if recipient and recipient[1] in self._names else None
        return True

    def _read_body(self, out: list[Delta]) -> bool:
        """Read the body of a message; return whether it is complete."""
        met = [(start, mark) for mark in _ENDS if (start := self._held.find(mark)) >= 0]
        if met:
            start, mark = min(met)
            self._finish(out, self._held[:start])
            self._held = self._held[start + (0 if mark == _START else len(mark)) :]
            self._header, self._in_header, self._tool = "", True, None
            return True
        if self._tool is None:
            certain = len(self._held) - max(held_back(self._held, mark) for mark in _ENDS)
            self._add(out, self._held[:certain])
            self._held = self._held[certain:]
        return False

    def _finish(self, out: list[Delta], body: str) -> None:
        """Add the (rest of the) body of a message that ends."""
        if self._tool is None:
            self._add(out, body)
            return
        arguments = loads(body.strip() or "{}")
        if isinstance(arguments, dict):
            out.append(Delta(tool_calls=self._numbers.number([Call(self._tool, arguments)])))
        else:  # a call without valid arguments stays text
            out.append(Delta(content=self._header + body))

    def _add(self, out: list[Delta], text: str) -> None:
        if text:
            out.append(Delta(thinking=text) if self._is_thinking else Delta(content=text))

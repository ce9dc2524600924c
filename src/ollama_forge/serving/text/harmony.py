"""The harmony format of gpt-oss: messages in channels (analysis, commentary, final); calls go to ``functions.name``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ollama_forge.serving.events import Delta
from ollama_forge.serving.text.tools.base import Call, Numbered
from ollama_forge.serving.text.tools.json_calls import loads
from ollama_forge.text.stops import held_back

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")


class HarmonyReader:
    """Reads thinking, content and tool calls from messages with headers; text without a header is content."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._number = Numbered()
        self._held = self._header = ""
        self._in_header = True
        self._thought = False
        self._callee: str | None = None

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        out: list[Delta] = []
        while (self._read_header() if self._in_header else self._read_body(out)) and self._held:
            pass
        return out

    def end(self) -> list[Delta]:
        out: list[Delta] = []
        if self._in_header:
            if not self._held.startswith("<|"):
                self._say(out, self._held)
        elif self._callee is not None:
            self._call(out, self._held)
        else:
            self._say(out, self._held)
        self._held = ""
        return out

    def _read_header(self) -> bool:
        """Read the header of a message; return whether it is complete."""
        begins = ("<|channel|>", _START, _MESSAGE)
        if not any(self._held.startswith(mark) or mark.startswith(self._held) for mark in begins):
            self._in_header = self._thought = False  # no header: the prompt began the message
            return True
        place = self._held.find(_MESSAGE)
        if place < 0:
            return False
        header, self._held = self._held[: place + len(_MESSAGE)], self._held[place + len(_MESSAGE) :]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._header, self._in_header = header, False
        self._thought = channel is not None and channel[1] == "analysis"
        self._callee = recipient[1] if recipient and recipient[1] in self._names else None
        return True

    def _read_body(self, out: list[Delta]) -> bool:
        """Read the body of a message; return whether it is complete."""
        met = [(place, mark) for mark in _ENDS if (place := self._held.find(mark)) >= 0]
        if met:
            place, mark = min(met)
            body, rest = self._held[:place], self._held[place + (0 if mark == _START else len(mark)) :]
            if self._callee is not None:
                self._call(out, body)
            else:
                self._say(out, body)
            self._held, self._header, self._in_header, self._callee = rest, "", True, None
            return True
        if self._callee is None:
            certain = len(self._held) - max(held_back(self._held, mark) for mark in _ENDS)
            self._say(out, self._held[:certain])
            self._held = self._held[certain:]
        return False

    def _say(self, out: list[Delta], text: str) -> None:
        if text:
            out.append(Delta(thinking=text) if self._thought else Delta(content=text))

    def _call(self, out: list[Delta], body: str) -> None:
        arguments = loads(body.strip() or "{}")
        if isinstance(arguments, dict) and self._callee is not None:
            out.append(Delta(tool_calls=self._number([Call(self._callee, arguments)])))
        else:  # a call without valid arguments stays text
            out.append(Delta(content=self._header + body))

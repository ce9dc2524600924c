"""The harmony format of gpt-oss: messages in channels (analysis, commentary, final); calls go to ``functions.name``."""

from __future__ import annotations

import re

from ollama_forge.serving.requests import Delta, Tools
from ollama_forge.serving.tools.arguments import accepted
from ollama_forge.serving.tools.base import NAME, CallNumbers, Held, Steps
from ollama_forge.serving.tools.payloads import named_call
from ollama_forge.text.stops import held_back

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_END = re.compile("|".join(map(re.escape, _ENDS)))
_LONGEST_END = max(map(len, _ENDS))
_LONGEST_HEADER = 500
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(rf"to=(?:functions\.)?({NAME})")
# the first header may begin with the recipient, because the prompt ended with ``<|start|>assistant``
_RECIPIENT_FIRST = re.compile(rf"\s*to={NAME}\s*<\|")
_RECIPIENT_BEGUN = re.compile(rf"\s*(?:t(?:o(?:=(?:{NAME})?\s*<?)?)?)?")


class HarmonyParser:
    """Reads thinking, content and tool calls from messages with headers; text without a header is content.

    Args:
        tools: the tools that may be called; a call of another tool is content, with its header.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._numbers = CallNumbers()
        self._held = Held()
        self._out: list[Delta] = []
        self._reading = self._messages()

    def feed(self, text: str) -> list[Delta]:
        self._held.add(text)
        return self._read()

    def end(self) -> list[Delta]:
        self._held.ended = True
        return self._read()

    def _read(self) -> list[Delta]:
        next(self._reading, None)
        out, self._out = self._out, []
        return out

    def _messages(self) -> Steps[None]:
        recipient = yield from self._held.match(_RECIPIENT_FIRST, 0, _RECIPIENT_BEGUN)
        header = (yield from self._header()) if recipient else ""
        while self._held.text or not self._held.ended:
            if not header:
                mark = yield from self._held.one_of((_CHANNEL, _START, _MESSAGE), 0)
                header = (yield from self._header()) if mark else ""
            yield from self._body(header)
            header = ""

    def _header(self) -> Steps[str]:
        """Take the header of a message; one that the output ends in is left out, one that never ends is content."""
        while (end := self._held.text.find(_MESSAGE, 0, _LONGEST_HEADER)) < 0:
            if self._held.ended or len(self._held.text) >= _LONGEST_HEADER:
                text = self._held.take(_LONGEST_HEADER)
                if not self._held.ended or self._held.text:
                    self._out.append(Delta(content=text))
                return ""
            yield
        return self._held.take(end + len(_MESSAGE))

    def _body(self, header: str) -> Steps[None]:
        """Read the body of a message up to its end, and take it."""
        channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
        thinks = channel is not None and channel[1] == "analysis"
        if recipient and recipient[1] in self._tools:
            end = yield from self._held.search(_END, 0, _LONGEST_END)
            self._call(header, recipient[1], self._held.take(end.start() if end else len(self._held.text)))
        else:
            if recipient and not thinks:
                self._out.append(Delta(content=header))
            end = None
            while end is None and (self._held.text or not self._held.ended):
                end = _END.search(self._held.text)
                certain = end.start() if end else len(self._held.text) - self._begun_end()
                if text := self._held.take(certain):
                    self._out.append(Delta(thinking=text) if thinks else Delta(content=text))
                if end is None and not self._held.ended:
                    yield
        if end and end[0] != _START:
            self._held.take(len(end[0]))

    def _begun_end(self) -> int:
        """Number of characters at the end of the text that may begin the end of the message."""
        return 0 if self._held.ended else max(held_back(self._held.text, mark) for mark in _ENDS)

    def _call(self, header: str, name: str, body: str) -> None:
        calls = [call for found in named_call(name, body) if (call := accepted(found, self._tools)) is not None]
        if calls:
            self._out.append(Delta(tool_calls=self._numbers.number(calls)))
        else:  # a call without valid arguments stays text
            self._out.append(Delta(content=header + body))

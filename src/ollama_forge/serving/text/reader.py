"""Splits the text of an answer into thinking, content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ollama_forge.serving.events import Delta, ToolCall
from ollama_forge.serving.text.harmony import HarmonyReader
from ollama_forge.serving.text.tools.base import CallReader, ToolFamily
from ollama_forge.text.thinking import ThinkingSplit, ThoughtSplitter


class Reader(Protocol):
    """Splits text as it arrives: ``feed`` takes the next piece, ``end`` returns the text that was held back."""

    def feed(self, text: str) -> list[Delta]: ...

    def end(self) -> list[Delta]: ...


class TaggedReader:
    """Reads thinking between tags, then content with tool calls."""

    def __init__(self, thinking: ThinkingSplit | None, family: ToolFamily | None, names: Sequence[str]) -> None:
        self._thoughts = ThoughtSplitter(thinking) if thinking else None
        self._calls = CallReader(family, names) if family else None

    def feed(self, text: str) -> list[Delta]:
        thinking, content = self._thoughts.feed(text) if self._thoughts else ("", text)
        return self._deltas(thinking, content)

    def end(self) -> list[Delta]:
        thinking, content = self._thoughts.end() if self._thoughts else ("", "")
        deltas = self._deltas(thinking, content)
        return [*deltas, *self._called(self._calls.end())] if self._calls else deltas

    def _deltas(self, thinking: str, content: str) -> list[Delta]:
        if self._calls and content:
            rest = self._called(self._calls.feed(content))
            return [*([Delta(thinking=thinking)] if thinking else []), *rest]
        return [Delta(content=content, thinking=thinking)] if thinking or content else []

    @staticmethod
    def _called(pieces: list[str | tuple[ToolCall, ...]]) -> list[Delta]:
        return [Delta(content=piece) if isinstance(piece, str) else Delta(tool_calls=piece) for piece in pieces]


def reader_for(thinking: ThinkingSplit | None, family: ToolFamily, names: Sequence[str]) -> Reader:
    """The reader for an answer; it looks for tool calls only if the request has tools (``names``)."""
    if thinking is not None and thinking.channels:
        return HarmonyReader(names)
    return TaggedReader(thinking, family if names else None, names)

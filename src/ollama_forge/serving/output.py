"""From generated tokens to the deltas of a completion: text, stop strings, thinking, tool calls, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ollama_forge.serving.engine.base import Token
from ollama_forge.serving.requests import Delta, GenerationRequest, TokenLogprob, ToolCall
from ollama_forge.serving.tools.base import ToolCallParser, ToolFamily
from ollama_forge.serving.tools.harmony import HarmonyParser
from ollama_forge.text.detokenize import Detokeniser, TokenBytes
from ollama_forge.text.stops import StopStrings
from ollama_forge.text.thinking import ThinkingSplit, ThoughtSplitter


class OutputParser(Protocol):
    """Splits the text of an output into thinking, content and tool calls, as it arrives."""

    def feed(self, text: str) -> list[Delta]:
        """The deltas that the next piece of text completes."""
        ...

    def end(self) -> list[Delta]:
        """The deltas of the text that was held back."""
        ...


class TaggedParser:
    """Reads thinking between tags, then content with tool calls."""

    def __init__(self, thinking: ThinkingSplit | None, family: ToolFamily | None, names: Sequence[str]) -> None:
        self._thoughts = ThoughtSplitter(thinking) if thinking else None
        self._calls = ToolCallParser(family, names) if family else None

    def feed(self, text: str) -> list[Delta]:
        thinking, content = self._thoughts.feed(text) if self._thoughts else ("", text)
        return self._deltas(thinking, content)

    def end(self) -> list[Delta]:
        thinking, content = self._thoughts.end() if self._thoughts else ("", "")
        deltas = self._deltas(thinking, content)
        return [*deltas, *self._with_calls(self._calls.end())] if self._calls else deltas

    def _deltas(self, thinking: str, content: str) -> list[Delta]:
        if self._calls and content:
            rest = self._with_calls(self._calls.feed(content))
            return [*([Delta(thinking=thinking)] if thinking else []), *rest]
        return [Delta(content=content, thinking=thinking)] if thinking or content else []

    @staticmethod
    def _with_calls(pieces: list[str | tuple[ToolCall, ...]]) -> list[Delta]:
        return [Delta(content=piece) if isinstance(piece, str) else Delta(tool_calls=piece) for piece in pieces]


def parser_for(thinking: ThinkingSplit | None, family: ToolFamily, names: Sequence[str]) -> OutputParser:
    """The parser of an output; it looks for tool calls only if the request has tools (``names``)."""
    if thinking is not None and thinking.channels:
        return HarmonyParser(names)
    return TaggedParser(thinking, family if names else None, names)


class OutputProcessor:
    """Detokenises one output, cuts it at stop strings, and splits off thinking and tool calls.

    Attributes:
        text: the raw text so far, without a stop string.
        stopped_by: the stop string that ended the output, or None.
    """

    def __init__(self, tokens: TokenBytes, request: GenerationRequest, family: ToolFamily) -> None:
        thinking, names = request.prompt.thinking, request.prompt.tools
        markers = family.markers if names else ""
        if thinking is not None:
            markers += thinking.markers
        self._tokens = tokens
        self._detokeniser = Detokeniser(tokens, tokens.ids_within(markers))
        self._stops = StopStrings(request.stop)
        self._parser = parser_for(thinking, family, names)
        self._logprobs: list[TokenLogprob] = []
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def stopped_by(self) -> str | None:
        return self._stops.stopped_by

    def feed(self, token: Token) -> list[Delta]:
        """The deltas of a generated token.

        There are none while its text is incomplete or may begin a stop string, and there is one empty delta while its
        text may belong to a tag or a tool call.
        """
        if token.logprob is not None:
            self._logprobs.append(self._logprob(token))
        text = self._stops.feed(self._detokeniser.feed(token.id))
        if not text:
            return []
        self._pieces.append(text)
        return self._with_logprobs(self._parser.feed(text)) or [Delta()]

    def end(self) -> list[Delta]:
        """The deltas of the text that was held back."""
        text = ""
        if self.stopped_by is None:
            text = self._stops.feed(self._detokeniser.end()) + self._stops.end()
        self._pieces.append(text)
        return self._with_logprobs([*(self._parser.feed(text) if text else []), *self._parser.end()])

    def _with_logprobs(self, deltas: list[Delta]) -> list[Delta]:
        if not deltas or not self._logprobs:
            return deltas
        first, *others = deltas
        logprobs, self._logprobs = tuple(self._logprobs), []
        return [Delta(first.content, first.thinking, first.tool_calls, logprobs), *others]

    def _logprob(self, token: Token) -> TokenLogprob:
        assert token.logprob is not None
        top = tuple(self._token_logprob(other.id, other.value) for other in token.top)
        return self._token_logprob(token.id, token.logprob, top)

    def _token_logprob(self, id_: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(self._tokens.text(id_), tuple(self._tokens.of(id_)), value, top)

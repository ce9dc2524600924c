"""Turns the tokens that an engine generates into the deltas of an answer, with log-probabilities."""

from __future__ import annotations

from ollama_forge.serving.asks import Ask
from ollama_forge.serving.engine.base import Token
from ollama_forge.serving.events import Delta, TokenLogprob
from ollama_forge.serving.text.reader import reader_for
from ollama_forge.serving.text.tools.base import ToolFamily
from ollama_forge.text.detokenize import Detokeniser, TokenBytes
from ollama_forge.text.stops import StopStrings


class AnswerText:
    """Detokenises one answer, cuts it at stop strings, and splits off thinking and tool calls.

    Attributes:
        said: the raw text so far, without a stop string.
        stopped_by: the stop string that ended the answer, or None.
    """

    def __init__(self, tokens: TokenBytes, ask: Ask, family: ToolFamily) -> None:
        thinking, names = ask.prompt.thinking, ask.prompt.tools
        markers = family.markers if names else ""
        if thinking is not None:
            markers += thinking.markers
        self._tokens = tokens
        self._detokeniser = Detokeniser(tokens, tokens.ids_within(markers))
        self._stops = StopStrings(ask.stop)
        self._reader = reader_for(thinking, family, names)
        self._logprobs: list[TokenLogprob] = []
        self._said: list[str] = []

    @property
    def said(self) -> str:
        return "".join(self._said)

    @property
    def stopped_by(self) -> str | None:
        return self._stops.stopped_by

    def feed(self, step: Token) -> list[Delta]:
        """The deltas of a generated token.

        There are none while its text is incomplete or may begin a stop string, and there is one empty delta while its
        text may belong to a tag or a tool call.
        """
        if step.logprob is not None:
            self._logprobs.append(self._logprob(step))
        text = self._stops.feed(self._detokeniser.feed(step.id))
        if not text:
            return []
        self._said.append(text)
        return self._with_logprobs(self._reader.feed(text)) or [Delta()]

    def end(self) -> list[Delta]:
        """The deltas of the text that was held back."""
        text = ""
        if self.stopped_by is None:
            text = self._stops.feed(self._detokeniser.end()) + self._stops.end()
        self._said.append(text)
        return self._with_logprobs([*(self._reader.feed(text) if text else []), *self._reader.end()])

    def _with_logprobs(self, deltas: list[Delta]) -> list[Delta]:
        if not deltas or not self._logprobs:
            return deltas
        first, *others = deltas
        logprobs, self._logprobs = tuple(self._logprobs), []
        return [Delta(first.content, first.thinking, first.tool_calls, logprobs), *others]

    def _logprob(self, step: Token) -> TokenLogprob:
        assert step.logprob is not None
        top = tuple(self._token(other.id, other.value) for other in step.top)
        return self._token(step.id, step.logprob, top)

    def _token(self, id_: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(self._tokens.text(id_), tuple(self._tokens.of(id_)), value, top)

"""llama.cpp's ``/completion``, in process or on a server: the body of a request, and the tokens in its chunks."""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ollama_forge.serving.engine.base import EngineError, Logprob, SamplingParams, Token
from ollama_forge.serving.engine.json_schema import grammar_of, one_line
from ollama_forge.serving.engine.two_phase import Phase, Vocabulary

_RANDOM_SEED = (1 << 32) - 1  # llama.cpp draws a seed for this one
_LEAST_TEMPERATURE = 1e-6
_INCOMPLETE = b"\xf0\x9f\x98"  # the beginning of a character of four bytes
_LONGEST_GAP = 32  # tokens that end within a character, one after the other


def completion_body(phase: Phase) -> dict[str, Any]:
    """The body of a streamed request; the order of the samplers is that of ``sampler.py``.

    Raises:
        EngineError: the schema is not valid.
    """
    request = phase.request
    body = {
        "prompt": list(request.ids),
        "n_predict": request.max_tokens,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
        "n_probs": 0 if request.top_logprobs is None else max(1, request.top_logprobs),
        **_sampling(request.sampling, len(request.ids) + request.max_tokens),
    }
    if phase.must_go_on:
        body["logit_bias"] = [[id_, False] for id_ in sorted(request.end_ids)]
        body["ignore_eos"] = True
    if phase.schema is not None:
        body["json_schema"] = compact_schema(phase.schema)
    return body


def _sampling(params: SamplingParams, tokens: int) -> dict[str, Any]:
    seed = secrets.randbelow(_RANDOM_SEED) if params.seed is None else params.seed % _RANDOM_SEED
    return {
        "samplers": ["penalties", "top_k", "typ_p", "top_p", "min_p", "temperature"],
        "temperature": 0.0 if params.temperature < _LEAST_TEMPERATURE else params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "repeat_penalty": params.repeat_penalty,
        "repeat_last_n": tokens if params.repeat_last_n < 0 else params.repeat_last_n,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": seed,
    }


def compact_schema(schema: str) -> Any:
    """The schema that the other engines enforce, for JSON on one line: a model cannot write blanks for ever.

    Raises:
        EngineError: it is not valid; llama.cpp itself would ignore it.
    """
    try:
        grammar = json.loads(grammar_of(schema))
    except ValueError as error:
        raise EngineError(f"invalid format: {one_line(str(error))}") from None
    closed = grammar["grammars"][0]["json_schema"]
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**closed, "x-guidance": style}


def is_last(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk is the last one of a stream, which has no tokens."""
    return "stop_type" in chunk or bool(chunk.get("stop"))


class TokenReader:
    """Reads the tokens of one stream of chunks; an engine asks ``replay_body`` before it reads a chunk.

    llama.cpp sends no chunk for a token that ends within a character: the next chunk has the whole text, but the last
    token's id alone. The ids between are found again by the bytes of the text, else by a replay. They have no
    log-probabilities.

    Attributes:
        ids: the tokens that were read.
    """

    def __init__(self, phase: Phase, vocabulary: Vocabulary) -> None:
        self._phase, self._vocabulary = phase, vocabulary
        self.ids: list[int] = []

    def replay_body(self, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """A request, answered by one object, for the tokens that a chunk does not tell.

        It is None if the chunk tells all, and where the request would draw other tokens.
        """
        request, missing = self._phase.request, self._missing(chunk)
        if missing <= 0 or (not is_last(chunk) and self._told(chunk) is not None):
            return None
        if self._phase.schema is not None or request.sampling.temperature >= _LEAST_TEMPERATURE:
            return None
        prompt = [*request.ids, *self.ids]
        return {**completion_body(self._phase), "prompt": prompt, "n_predict": missing, "n_probs": 0, "stream": False}

    def read(self, chunk: Mapping[str, Any], replayed: Sequence[int] = ()) -> list[Token]:
        """The tokens of a chunk.

        Args:
            replayed: the ids that answer ``replay_body``; none if it is None, or there was no answer.
        """
        tokens = self._tail(chunk, replayed) if is_last(chunk) else self._told(chunk)
        if tokens is None:
            tokens = self._filled(chunk, replayed)
        self.ids += [token.id for token in tokens]
        return tokens

    def _missing(self, chunk: Mapping[str, Any]) -> int:
        """How many tokens were generated, but not read; a chunk that is not the last one holds the last of them."""
        return int(chunk["tokens_predicted"]) - len(self.ids)

    def _told(self, chunk: Mapping[str, Any]) -> list[Token] | None:
        """The tokens of a chunk that is not the last one; None if the ids between cannot be found."""
        count = self._missing(chunk)
        if count <= 0 or not chunk["tokens"]:  # the progress of the prompt
            return []
        last = self._token(chunk["tokens"][-1], chunk)
        between = self._between(str(chunk["content"]), count - 1, last.id)
        return None if between is None else [*map(Token, between), last]

    def _filled(self, chunk: Mapping[str, Any], replayed: Sequence[int]) -> list[Token]:
        """The tokens of a chunk, by a replay if it fits, else other tokens with the same text."""
        last = self._token(chunk["tokens"][-1], chunk)
        if len(replayed) == self._missing(chunk) and replayed[-1] == last.id:
            return [*map(Token, replayed[:-1]), last]
        return [*map(Token, self._vocabulary.encode(str(chunk["content"])))]

    def _tail(self, chunk: Mapping[str, Any], replayed: Sequence[int]) -> list[Token]:
        """The tokens of an incomplete character at the end of an output, before the last chunk.

        Without a replay nobody knows them. They become others that make up an incomplete character, so that as many
        are counted as were generated, and an output that was cut is known to be.
        """
        missing = self._missing(chunk)
        if missing <= 0:
            return []
        ids = [self._vocabulary.ids.get(bytes([byte])) for byte in _INCOMPLETE]
        known = [id_ for id_ in ids if id_ is not None]
        if not replayed and chunk.get("stop_type") == "limit" and len(known) == len(ids):
            replayed = [known[place % len(known)] for place in range(missing)]
        return [*map(Token, replayed)]

    def _token(self, id_: int, chunk: Mapping[str, Any]) -> Token:
        top, found = self._phase.request.top_logprobs, chunk.get("completion_probabilities")
        if top is None or not found:
            return Token(id_)
        rivals = (Logprob(entry["id"], entry["logprob"]) for entry in found[0]["top_logprobs"][:top])
        return Token(id_, found[0]["logprob"], tuple(rivals))

    def _between(self, text: str, count: int, last: int) -> list[int] | None:
        if not count:
            return []
        data, own = text.encode(), self._vocabulary.tokens.of(last)
        if count > _LONGEST_GAP or not own or not data.endswith(own):
            return None
        return split_within_characters(data[: -len(own)], count, self._vocabulary.ids)


def split_within_characters(data: bytes, count: int, ids: Mapping[bytes, int]) -> list[int] | None:
    """The ids of ``count`` tokens that make up ``data``, each ending within a character; None if there are none.

    Of several ways to split, the one with the longest first tokens is taken.
    """

    @cache
    def split(start: int, left: int) -> tuple[int, ...] | None:
        if not left:
            return () if start == len(data) else None
        for end in range(len(data) - left + 1, start, -1):
            token = ids.get(data[start:end])
            if token is not None and _ends_within_character(data[:end]):
                rest = split(end, left - 1)
                if rest is not None:
                    return (token, *rest)
        return None

    found = split(0, count)
    return None if found is None else list(found)


def _ends_within_character(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return bool(decoder.getstate()[0])

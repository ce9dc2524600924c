"""llama.cpp's ``/completion``, in process or on a server: the body of a request, and the tokens in its chunks."""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Mapping
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


class TokenReader:
    """Reads the tokens of one stream of chunks.

    llama.cpp sends no chunk for a token that ends within a character: the next chunk has the whole text, but the last
    token's id alone. The ids between are found again by the bytes of the text. They have no log-probabilities.

    Attributes:
        ids: the tokens that were read.
    """

    def __init__(self, phase: Phase, vocabulary: Vocabulary) -> None:
        self._phase, self._vocabulary = phase, vocabulary
        self.ids: list[int] = []

    def missing(self, chunk: Mapping[str, Any]) -> int:
        """How many tokens were generated, but not read; a chunk that is not the last one holds the last of them."""
        return int(chunk["tokens_predicted"]) - len(self.ids)

    def read(self, chunk: Mapping[str, Any]) -> list[Token] | None:
        """The tokens of a chunk that is not the last one; None if the ids between cannot be found (see ``fill``)."""
        count = self.missing(chunk)
        if count <= 0 or not chunk["tokens"]:  # the progress of the prompt
            return []
        last = self._token(chunk["tokens"][-1], chunk)
        between = self._between(str(chunk["content"]), count - 1, last.id)
        return None if between is None else self._add([*map(Token, between), last])

    def replay_body(self, count: int) -> dict[str, Any] | None:
        """A request for the next ``count`` tokens as one object; None where it would draw other tokens."""
        request = self._phase.request
        if self._phase.schema is not None or request.sampling.temperature >= _LEAST_TEMPERATURE:
            return None
        prompt = [*request.ids, *self.ids]
        return {**completion_body(self._phase), "prompt": prompt, "n_predict": count, "n_probs": 0, "stream": False}

    def fill(self, chunk: Mapping[str, Any], replayed: list[int]) -> list[Token]:
        """The tokens of a chunk, by a replay if it fits, else other tokens with the same text."""
        last = self._token(chunk["tokens"][-1], chunk)
        if len(replayed) == self.missing(chunk) and replayed[-1] == last.id:
            return self._add([*map(Token, replayed[:-1]), last])
        text = str(chunk["content"])
        return self._add([*map(Token, self._vocabulary.encode(text))])

    def tail(self, chunk: Mapping[str, Any], replayed: list[int]) -> list[Token]:
        """The tokens of an incomplete character at the end of an output, before the last chunk.

        Without a replay nobody knows them. They become others that make up an incomplete character, so that as many
        are counted as were generated, and an output that was cut is known to be.
        """
        ids = [self._vocabulary.ids.get(bytes([byte])) for byte in _INCOMPLETE]
        known = [id_ for id_ in ids if id_ is not None]
        if not replayed and chunk["stop_type"] == "limit" and len(known) == len(ids):
            replayed = [known[place % len(known)] for place in range(self.missing(chunk))]
        return self._add([*map(Token, replayed)])

    def _add(self, tokens: list[Token]) -> list[Token]:
        self.ids += [token.id for token in tokens]
        return tokens

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

"""Structured outputs: at each step, llguidance finds the tokens that can lead to JSON that satisfies the schema."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ollama_forge.serving.engine.base import Constraint, EngineError
from ollama_forge.serving.engine.json_schema import calls_grammar, grammar_of, one_line

_CACHED = 64


class GrammarCompiler:
    """Compiles JSON schemas to grammars over one tokenizer's tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocabulary: number of logits of the model.
        end_ids: the end-of-sequence ids.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: list[int]) -> None:
        self.tokenizer, self.vocabulary, self.end_ids = tokenizer, vocabulary, end_ids
        self._compiled = lru_cache(_CACHED)(self._compile)

    @cached_property
    def tokens(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(
                self.tokenizer, n_vocab=max(self.vocabulary, len(self.tokenizer)), eos_token=self.end_ids
            )
        except ValueError as error:
            raise EngineError("this model's tokenizer does not support structured outputs (format)") from error

    @cached_property
    def texts(self) -> list[tuple[bytes, int]]:
        """``(bytes, id)`` of every token, sorted by bytes."""
        return sorted((self.tokens.decode_bytes([token]), token) for token in range(self.vocabulary))

    def starting_with(self, start: bytes) -> Iterator[tuple[bytes, int]]:
        """``(bytes, id)`` of the tokens that are longer than ``start`` and begin with it."""
        for text, token in self.texts[bisect_left(self.texts, (start, -1)) :]:
            if not text.startswith(start):
                return
            if len(text) > len(start):
                yield text, token

    def start(self, constraint: Constraint) -> GrammarMatcher:
        """A constraint for one sequence; the first of its kind is compiled, which takes milliseconds to seconds.

        Raises:
            EngineError: the constraint cannot be enforced; ``check_schema`` tells beforehand.
        """
        matcher = self._compiled(constraint).deep_copy()
        return GrammarMatcher(self, matcher, [text.encode() for text in constraint.after])

    def _compile(self, constraint: Constraint) -> LLMatcher:
        try:
            if constraint.calls is None:
                grammar = grammar_of(constraint.schema)
            else:
                grammar = calls_grammar(constraint.calls, self._split_special)
            matcher = LLMatcher(self.tokens, grammar, log_level=0)
        except ValueError as error:
            raise EngineError(f"invalid format: {one_line(str(error))}") from None
        if matcher.is_error():
            raise EngineError(f"invalid format: {one_line(matcher.get_error())}")
        return matcher

    def _split_special(self, text: str) -> list[str | int]:
        """Split a text into texts without special tokens and ids of special tokens."""
        if not self._special:
            return [text]
        pattern = "|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True))
        return [self._special.get(part, part) for part in re.split(f"({pattern})", text) if part]

    @cached_property
    def _special(self) -> dict[str, int]:
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        return {text: id_ for text, id_ in added.items() if text and self.tokens.is_special_token(id_)}


class GrammarMatcher:
    """The constraint of one sequence and its progress."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher, after: list[bytes]) -> None:
        self.compiler, self.matcher, self._after = compiler, matcher, after
        self._tail = b""  # the last bytes of the free text, which may be the beginning of the next text of ``after``

    @property
    def free(self) -> bool:
        """Whether the constraint has not begun."""
        return bool(self._after)

    @property
    def finished(self) -> bool:
        """Whether the JSON is complete, so that no token can follow."""
        return not self.free and self.matcher.is_stopped()

    def allowed(self, end_ids: frozenset[int]) -> Tensor:
        """Mask of the tokens that may come next, bool ``[vocabulary]``; complete JSON also allows ``end_ids``."""
        vocabulary = self.compiler.vocabulary
        if self.free:
            mask = torch.ones(vocabulary, dtype=torch.bool)
            mask[self._straddling()] = False
            stop = False
        else:
            words = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            mask = torch.from_numpy(np.unpackbits(words, bitorder="little")[:vocabulary].astype(np.bool_))
            stop = self.matcher.is_accepting()
        mask[self.compiler.end_ids] = stop
        for end in end_ids:
            mask[end] = stop
        return mask

    def add(self, token: int) -> None:
        """Advance by a generated token.

        Raises:
            EngineError: the matcher rejects the token, because it reached one of its own limits.
        """
        if not self.free:
            if not self.matcher.consume_token(token):
                raise EngineError(f"the structured output cannot be continued: {one_line(self.matcher.get_error())}")
            return
        self._tail += self.compiler.tokens.decode_bytes([token])
        while self._after:
            awaited = self._after[0]
            place = self._tail.find(awaited)
            if place < 0:
                self._tail = self._tail[max(0, len(self._tail) - len(awaited) + 1) :]
                return
            self._after, self._tail = self._after[1:], self._tail[place + len(awaited) :]
        self._begin(self.matcher, self._tail)

    def _begin(self, matcher: LLMatcher, rest: bytes) -> bool:
        """Feed the bytes of a token that follow the last text of ``after``; return whether the schema allows them."""
        rest = rest.lstrip()
        return not rest or matcher.consume_tokens(self.compiler.tokens.tokenize_bytes(rest))

    def _straddling(self) -> list[int]:
        """Ids of the tokens that begin the constraint and continue with bytes that the schema does not allow."""
        out: list[int] = []
        awaited, *others = self._after
        for length in range(1, 1 if others else len(awaited)):
            if self._tail.endswith(awaited[:length]):
                for text, token in self.compiler.starting_with(awaited[length:]):
                    rest = text[len(awaited) - length :]
                    if not self._begin(self.matcher.deep_copy(), rest):
                        out.append(token)
        return out

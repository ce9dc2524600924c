"""Structured outputs: at each step, llguidance finds the tokens that can lead to JSON that satisfies the schema."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ollama_forge.serving.engine.base import Constraint, EngineError
from ollama_forge.serving.engine.json_schema import grammar_of, one_line


class GrammarCompiler:
    """Compiles JSON schemas to grammars over one tokenizer's tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocabulary: number of logits of the model.
        end_ids: the end-of-sequence ids.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: list[int]) -> None:
        self.tokenizer, self.vocabulary, self.end_ids = tokenizer, vocabulary, end_ids

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
        """Compile a constraint for one sequence.

        Raises:
            EngineError: the schema cannot be enforced; ``check_schema`` tells beforehand.
        """
        try:
            matcher = LLMatcher(self.tokens, grammar_of(constraint.schema), log_level=0)
        except ValueError as error:
            raise EngineError(f"invalid format: {one_line(str(error))}") from None
        if matcher.is_error():
            raise EngineError(f"invalid format: {one_line(matcher.get_error())}")
        return GrammarMatcher(self, matcher, constraint.after.encode() if constraint.after else b"")


class GrammarMatcher:
    """The constraint of one sequence and its progress."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher, after: bytes) -> None:
        self.compiler, self.matcher, self.after = compiler, matcher, after
        self.free = bool(after)
        self._tail = b""  # the last bytes of the free text, which may be the beginning of ``after``

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
        text = self._tail + self.compiler.tokens.decode_bytes([token])
        place = text.find(self.after)
        if place < 0:
            self._tail = text[max(0, len(text) - len(self.after) + 1) :]
            return
        self.free = False
        self._begin(self.matcher, text[place + len(self.after) :])

    def _begin(self, matcher: LLMatcher, rest: bytes) -> bool:
        """Feed the bytes of a token that follow ``after``; return whether the schema allows them."""
        rest = rest.lstrip()
        return not rest or matcher.consume_tokens(self.compiler.tokens.tokenize_bytes(rest))

    def _straddling(self) -> list[int]:
        """Ids of the tokens that complete ``after`` and continue with bytes that the schema does not allow."""
        out = []
        for length in range(1, len(self.after)):
            if self._tail.endswith(self.after[:length]):
                for text, token in self.compiler.starting_with(self.after[length:]):
                    rest = text[len(self.after) - length :]
                    if not self._begin(self.matcher.deep_copy(), rest):
                        out.append(token)
        return out

"""Answers that satisfy a JSON schema: at each step a mask of the tokens that can still lead to one (llguidance)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ollama_forge.serving.engines.base import Constraint, EngineError
from ollama_forge.serving.engines.schema import grammar_of, one_line


class Grammars:
    """Schemas over one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocabulary: how many logits the model gives.
        ends: the ids that end answers.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends

    @cached_property
    def tokens(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(
                self.tokenizer, n_vocab=max(self.vocabulary, len(self.tokenizer)), eos_token=self.ends
            )
        except ValueError as error:
            raise EngineError("this model's tokenizer cannot be constrained to a format") from error

    @cached_property
    def texts(self) -> list[tuple[bytes, int]]:
        """Every token's bytes and id, in the bytes' order."""
        return sorted((self.tokens.decode_bytes([token]), token) for token in range(self.vocabulary))

    def starting_with(self, start: bytes) -> Iterator[tuple[bytes, int]]:
        """Tokens that begin with some bytes and go on."""
        for text, token in self.texts[bisect_left(self.texts, (start, -1)) :]:
            if not text.startswith(start):
                return
            if len(text) > len(start):
                yield text, token

    def enforce(self, constraint: Constraint) -> Enforced:
        """
        Raises:
            EngineError: a schema that cannot be enforced (``check_schema`` says so beforehand).
        """
        try:
            matcher = LLMatcher(self.tokens, grammar_of(constraint.schema), log_level=0)
        except ValueError as error:
            raise EngineError(f"invalid format: {one_line(str(error))}") from None
        if matcher.is_error():
            raise EngineError(f"invalid format: {one_line(matcher.get_error())}")
        return Enforced(self, matcher, constraint.after.encode() if constraint.after else b"")


class Enforced:
    """One answer's constraint and how far the answer got in it."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher, after: bytes) -> None:
        self.grammars, self.matcher, self.after = grammars, matcher, after
        self.free = bool(after)
        self._tail = b""  # of the free text: as much as may be the beginning of ``after``

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return not self.free and self.matcher.is_stopped()

    def allowed(self, ends: frozenset[int]) -> Tensor:
        """Bool ``[vocabulary]``: what may come next; ends where the schema is satisfied."""
        vocabulary = self.grammars.vocabulary
        if self.free:
            mask = torch.ones(vocabulary, dtype=torch.bool)
            mask[self._straddling()] = False
            stop = False
        else:
            words = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            mask = torch.from_numpy(np.unpackbits(words, bitorder="little")[:vocabulary].astype(np.bool_))
            stop = self.matcher.is_accepting()
        mask[self.grammars.ends] = stop
        for end in ends:
            mask[end] = stop
        return mask

    def add(self, token: int) -> None:
        """
        Raises:
            EngineError: the matcher's own limits were hit.
        """
        if not self.free:
            if not self.matcher.consume_token(token):
                raise EngineError(f"the format can't be gone on with: {one_line(self.matcher.get_error())}")
            return
        text = self._tail + self.grammars.tokens.decode_bytes([token])
        place = text.find(self.after)
        if place < 0:
            self._tail = text[max(0, len(text) - len(self.after) + 1) :]
            return
        self.free = False
        self._begin(self.matcher, text[place + len(self.after) :])

    def _begin(self, matcher: LLMatcher, rest: bytes) -> bool:
        """Feed what a token says behind the free text's end; whether the schema allows that."""
        rest = rest.lstrip()
        return not rest or matcher.consume_tokens(self.grammars.tokens.tokenize_bytes(rest))

    def _straddling(self) -> list[int]:
        """Tokens that would end the free text and go on with something that the schema doesn't allow."""
        out = []
        for length in range(1, len(self.after)):
            if self._tail.endswith(self.after[:length]):
                for text, token in self.grammars.starting_with(self.after[length:]):
                    rest = text[len(self.after) - length :]
                    if not self._begin(self.matcher.deep_copy(), rest):
                        out.append(token)
        return out

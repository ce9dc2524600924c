"""The exact bytes of each token, and incremental detokenisation."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_PAIRS = 100_000  # of tokens whose text is kept


def _byte_alphabet() -> dict[str, int]:
    """The byte of each letter in byte-level BPE: printable bytes are their own letters, the others begin at U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    letters.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return letters


class TokenBytes:
    """The bytes that each token id adds to a text, leading spaces included.

    Byte-level BPE and byte-fallback vocabularies are read as bytes, because a token may hold part of a character. For
    any other tokenizer, a token's text is what the decoded text gains if the token follows another one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kind = _kind(tokenizer)
        self._letters = _byte_alphabet() if self._kind == "bytes" else {}
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._added = {int(id_): str(token) for id_, token in added.items()}
        special = {int(id_) for id_, token in added.items() if getattr(token, "special", False)}
        self.special = frozenset(special | set(getattr(tokenizer, "all_special_ids", ())))
        self._cache: dict[int, bytes] = {}
        self._behind = lru_cache(_MOST_PAIRS)(self._gained)
        self._anchor: int | None = None

    def of(self, id_: int) -> bytes:
        """The bytes of a token within a text; those of a special token spell it. Empty for ids that no token has."""
        known = self._cache.get(id_)
        if known is None:
            known = self._cache[id_] = self._find(id_)
        return known

    def between(self, before: int | None, id_: int) -> bytes:
        """The bytes that a token adds behind the token ``before``; None: it begins a text.

        At the beginning of a text, decoders leave out the space that stands for the border of a word. Within a text,
        only vocabularies of words look at the token before.
        """
        if before is not None and self._kind != "words":
            return self.of(id_)
        return self._behind(before, id_)

    def text(self, id_: int) -> str:
        return self.of(id_).decode("utf-8", errors="replace")

    def ids_within(self, markers: str) -> frozenset[int]:
        """Ids of the special tokens whose text occurs in ``markers``."""
        return frozenset(id_ for id_ in self.special if (text := self._added.get(id_)) and text in markers)

    def specials(self, texts: Collection[str]) -> frozenset[int]:
        """Ids of the special tokens whose text is one of ``texts``."""
        return frozenset(id_ for id_ in self.special if self._added.get(id_) in texts)

    def _find(self, id_: int) -> bytes:
        if id_ in self.special and id_ in self._added:
            return self._added[id_].encode()
        if self._kind == "words":
            if self._anchor is None:
                self._anchor = next((i for i in range(len(self._tokenizer)) if i not in self.special), 0)
            return self._gained(self._anchor, id_)
        try:
            token = self._tokenizer.convert_ids_to_tokens(int(id_))
        except (IndexError, OverflowError, ValueError):
            token = None
        if not isinstance(token, str):
            return b""
        if self._kind == "bytes":
            try:
                return bytes(self._letters[letter] for letter in token)
            except KeyError:  # a token outside the byte alphabet is its own text
                return token.encode()
        single = _BYTE.fullmatch(token)
        return bytes([int(single[1], 16)]) if single else token.replace("\u2581", " ").encode()

    def _gained(self, before: int | None, id_: int) -> bytes:
        """What the decoded text gains by a token."""
        if self._kind == "bytes" or (id_ in self.special and id_ in self._added):
            return self.of(id_)
        ids = [] if before is None else [before]
        try:
            text = str(self._tokenizer.decode([*ids, id_])).removeprefix(str(self._tokenizer.decode(ids)))
        except (IndexError, OverflowError, TypeError):
            return b""
        # a byte of a character cannot be decoded alone
        return self.of(id_) if self._kind == "pieces" and "\ufffd" in text else text.encode()


def _kind(tokenizer: Any) -> str:
    """The kind of vocabulary: ``bytes`` (byte-level BPE), ``pieces`` (SentencePiece and similar) or ``words``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "pieces" if hasattr(tokenizer, "sp_model") else "words"
    if backend.decoder is None:
        return "words"
    state = backend.decoder.__getstate__()
    decoder = json.loads(state)
    parts = decoder.get("decoders", [decoder])
    types = {part.get("type") for part in parts}
    if "ByteLevel" in types:
        return "bytes"
    replaces = any(part.get("type") == "Replace" and "\u2581" in json.dumps(part, ensure_ascii=False) for part in parts)
    return "pieces" if replaces or types & {"ByteFallback", "Metaspace"} else "words"


class Detokeniser:
    """Turns the ids of an answer into text as they arrive; an incomplete character waits for its remaining bytes.

    Special tokens give no text, except those in ``keep``.

    Args:
        continues: the answer continues a text, and keeps the space before its first word.
    """

    def __init__(self, tokens: TokenBytes, keep: frozenset[int] = frozenset(), *, continues: bool = False) -> None:
        self._tokens, self._hidden = tokens, tokens.special - keep
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._before: int | None = None
        self._begun = continues

    def feed(self, id_: int) -> str:
        if id_ in self._hidden or not (data := self._tokens.of(id_)):
            return ""
        if self._before is not None or not self._begun:
            data = self._tokens.between(self._before, id_)
        self._begun, self._before = True, id_
        return self._decoder.decode(data)

    def end(self) -> str:
        """U+FFFD if the answer ends within a character, else ""."""
        return self._decoder.decode(b"", final=True)

"""The exact bytes of each token, and text out of them a token at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in byte-level BPE: printable ones for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    letters.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return letters


class TokenBytes:
    """What each id of a tokenizer adds to a text, in bytes; leading spaces are part of it.

    Byte-level BPE and byte-fallback vocabularies are read as bytes, so that half a character is half a character;
    of any other tokenizer a token's text is what decoding it behind another one adds.
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
        self._anchor: tuple[int, str] | None = None

    def of(self, id_: int) -> bytes:
        """The bytes of a token that is not an answer's first (see ``first``); none of an id beyond the vocabulary."""
        known = self._cache.get(id_)
        if known is None:
            known = self._cache[id_] = self._find(id_)
        return known

    def first(self, id_: int) -> bytes:
        """The bytes of an answer's first token: without the space that a word-level tokenizer joins words with."""
        if self._kind == "words" and id_ not in self._added:
            return str(self._tokenizer.decode([id_])).encode()
        return self.of(id_)

    def text(self, id_: int) -> str:
        return self.of(id_).decode("utf-8", errors="replace")

    def ids_within(self, markers: str) -> frozenset[int]:
        """Special tokens whose text stands somewhere in ``markers``."""
        return frozenset(id_ for id_ in self.special if (text := self._added.get(id_)) and text in markers)

    def specials(self, texts: Collection[str]) -> frozenset[int]:
        """Special tokens whose text is one of ``texts``."""
        return frozenset(id_ for id_ in self.special if self._added.get(id_) in texts)

    def _find(self, id_: int) -> bytes:
        if id_ in self._added:
            return self._added[id_].encode()
        if self._kind == "words":
            return self._behind_another(id_)
        try:
            token = self._tokenizer.convert_ids_to_tokens(int(id_))
        except (IndexError, OverflowError, ValueError):
            token = None
        if not isinstance(token, str):
            return b""
        if self._kind == "bytes":
            try:
                return bytes(self._letters[letter] for letter in token)
            except KeyError:  # not spelt in the alphabet: it stands for itself
                return token.encode()
        single = _BYTE.fullmatch(token)
        return bytes([int(single[1], 16)]) if single else token.replace("\u2581", " ").encode()

    def _behind_another(self, id_: int) -> bytes:
        if self._anchor is None:
            anchor = next((i for i in range(len(self._tokenizer)) if i not in self.special), 0)
            self._anchor = anchor, str(self._tokenizer.decode([anchor]))
        anchor, before = self._anchor
        try:
            return str(self._tokenizer.decode([anchor, id_])).removeprefix(before).encode()
        except (IndexError, OverflowError, TypeError):
            return b""


def _kind(tokenizer: Any) -> str:
    """``bytes`` (byte-level BPE), ``pieces`` (sentencepiece and its like) or ``words`` (whatever else)."""
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
    """Text of an answer as its ids arrive; half a character waits for its other half.

    Special tokens have no text but those in ``keep``.
    """

    def __init__(self, tokens: TokenBytes, keep: frozenset[int] = frozenset()) -> None:
        self._tokens, self._hidden = tokens, tokens.special - keep
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def feed(self, id_: int) -> str:
        if id_ in self._hidden:
            return ""
        data = self._tokens.of(id_) if self._begun else self._tokens.first(id_)
        self._begun = True
        return self._decoder.decode(data)

    def end(self) -> str:
        """What was waiting (the U+FFFD of half a character)."""
        return self._decoder.decode(b"", final=True)

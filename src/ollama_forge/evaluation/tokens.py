"""Compare the tokens of a converted file with those of the checkpoint's tokenizer, on texts of many types."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.evaluation.token_texts import texts
from ollama_forge.models.servers.token_server import TokenServer
from ollama_forge.text.tokenizer import Ids, Tokenizer

SHOWN = 5
_SPACES = " \t\r\nĠĊĉč▁\u00a0"
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!  How are you?\n"}],
    [{"role": "user", "content": "Что нового? 东京在哪里？ 🙂"}],
    [
        {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4\n\n    print(2 + 2)"},
        {"role": "user", "content": "And 12345 * 6?"},
    ],
)


@dataclass(frozen=True)
class Mismatch:
    """A text with its tokens by the checkpoint's tokenizer (``expected``) and by the file (``found``)."""

    text: str
    expected: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True)
class TokenCheck:
    """The result of a comparison.

    Attributes:
        texts: number of texts that were compared.
        mismatches: number of texts whose tokens differ.
        garbled: number of texts that differ in more than whitespace tokens and Unicode composition.
        examples: some mismatches, garbled ones first.
        composed: number of texts that differ by Unicode composition alone: the checkpoint's tokenizer composes a letter
            and its accents into one character before it makes tokens, and llama.cpp does not.
    """

    texts: int
    mismatches: int
    garbled: int
    examples: tuple[Mismatch, ...]
    composed: int = 0


def check_tokens(tokenizer: Tokenizer, tokenize: Callable[[str], Ids], extra: Sequence[str] = ()) -> TokenCheck:
    """Compare on the standard texts, the special tokens, some rendered conversations, and the ``extra`` texts.

    Args:
        tokenizer: the checkpoint's tokenizer.
        tokenize: tokenizes a text with the file.
    """
    compared = list(dict.fromkeys([*texts(), *_special(tokenizer.backend), *_rendered(tokenizer), *extra]))
    examples: list[Mismatch] = []
    mismatches = garbled = composed = 0
    for text in compared:
        expected, found = tokenizer.encode_plain(text), tokenize(text)
        if expected == found:
            continue
        mismatches += 1
        mismatch = Mismatch(text, _pieces(tokenizer.backend, expected), _pieces(tokenizer.backend, found))
        nfc = unicodedata.normalize("NFC", text)
        by_composition = nfc != text and tokenize(nfc) == expected
        differs = not by_composition and _words(mismatch.expected) != _words(mismatch.found)
        composed += by_composition
        garbled += differs
        examples.insert(garbled - 1 if differs else len(examples), mismatch)  # garbled texts first
    return TokenCheck(len(compared), mismatches, garbled, tuple(examples[:SHOWN]), composed)


def check_server_tokens(server: TokenServer, tokenizer: Tokenizer) -> str | None:
    """Why a server's tokens are not those of a checkpoint; None if they are, or if the server does not tokenize."""
    if server.tokenize("a") is None:
        return None
    check = check_tokens(tokenizer, lambda text: server.tokenize(text) or [])
    if not check.garbled:
        return None
    return f"has another tokenizer: {check.garbled} of {check.texts} texts are other tokens there"


def _special(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.get_added_vocab()]
    return [text for token in added[:40] for text in (token, f"Before {token} after", f"{token}\n{token}x")]


def _rendered(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.render(turns) for turns in _CONVERSATIONS] if tokenizer.template.text else []


def _pieces(tokenizer: Any, ids: Ids) -> tuple[str, ...]:
    return tuple(
        str(token) if token is not None else f"<{number}>"
        for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    )


def _words(pieces: Sequence[str]) -> list[str]:
    """The tokens that are more than whitespace."""
    return [piece for piece in pieces if piece.strip(_SPACES)]

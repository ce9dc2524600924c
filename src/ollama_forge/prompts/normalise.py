"""Normalise instructions: to one line each, and to a form in which duplicates are equal."""

from __future__ import annotations

import re
import unicodedata

_NOT_WORD = re.compile(r"[^\w\s]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_BYTE_ORDER_MARK = "\ufeff"


def one_line(text: str) -> str:
    """``text`` as one line that can be encoded as UTF-8.

    Each run of white space, Unicode line ends and control characters becomes one space. Byte-order marks are removed. A
    lone surrogate becomes ``?``.
    """
    whole = text.replace(_BYTE_ORDER_MARK, "").encode("utf-8", "replace").decode()
    return " ".join(_CONTROL.sub(" ", whole).split())


def normalise(line: str) -> str:
    """Remove differences of case, punctuation, spacing and Unicode form: ``"Write  a Poem."`` -> ``"write a poem"``."""
    folded = unicodedata.normalize("NFKC", line).casefold()
    return " ".join(_NOT_WORD.sub(" ", folded).split())


def dedupe(lines: list[str]) -> list[str]:
    """Keep the first of all lines with the same normalised form, in order."""
    seen: dict[str, str] = {}
    for line in lines:
        seen.setdefault(normalise(line), line)
    return list(seen.values())

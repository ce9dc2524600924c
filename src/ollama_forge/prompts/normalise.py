"""What an instruction is as text: one line of it, and what makes two lines the same."""

from __future__ import annotations

import re
import unicodedata

_NOT_WORD = re.compile(r"[^\w\s]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_BYTE_ORDER_MARK = "\ufeff"


def one_line(text: str) -> str:
    """``text`` on one line that encodes to UTF-8.

    Each run of white space, line ends (those of Unicode too) and control characters becomes one space, byte-order
    marks go, and half of a surrogate pair becomes ``?``.
    """
    whole = text.replace(_BYTE_ORDER_MARK, "").encode("utf-8", "replace").decode()
    return " ".join(_CONTROL.sub(" ", whole).split())


def normalise(line: str) -> str:
    """Case, punctuation, accents' encoding and spacing aside: ``"Write  a Poem."`` -> ``"write a poem"``."""
    folded = unicodedata.normalize("NFKC", line).casefold()
    return " ".join(_NOT_WORD.sub(" ", folded).split())


def dedupe(lines: list[str]) -> list[str]:
    """The first of each group of lines that are equal once normalised, in order."""
    seen: dict[str, str] = {}
    for line in lines:
        seen.setdefault(normalise(line), line)
    return list(seen.values())

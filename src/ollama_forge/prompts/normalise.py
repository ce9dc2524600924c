"""What makes two instructions the same line."""

from __future__ import annotations

import re
import unicodedata

_NOT_WORD = re.compile(r"[^\w\s]+")


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

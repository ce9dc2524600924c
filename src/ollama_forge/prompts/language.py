"""Detect texts that are not English, because refusals in English are recognised best."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

FEWEST_WORDS = 6
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
# omits words that are also words of other languages: "in", "is", "a", "no", "me", "so", "of", "was", "an", "or"
_FUNCTION_WORD = re.compile(
    r"the|and|to|for|with|that|this|these|those|you|your|it|its|are|be|been|can|from|not|have|has|by|will|would|they|"
    r"their|which|what|how|if|when|there|but|all|more|should|could|i'm|it's|i've|don't|can't|let's|he|she|his|her|we|"
    r"our|us|my|as|at|on|into|about|because|while|where|who|why|than|then|some|any|each|other|such|only|also|out|up|"
    r"after|before|between|through|during|without|here's|you're|one|two|being|do|does|did"
)


def count_not_english(texts: Iterable[str]) -> int:
    """Count the texts that are clearly not English.

    A text counts if most of its letters are not Latin, or if it has at least 6 words and fewer than 5 % of them are
    common English function words. Code blocks are ignored.
    """
    return sum(_is_not_english(text) for text in texts)


def _is_not_english(text: str) -> bool:
    plain = _CODE.sub(" ", unicodedata.normalize("NFC", text))
    letters = [char for char in plain if char.isalpha()]
    latin = sum(char.isascii() or unicodedata.name(char, "").startswith("LATIN ") for char in letters)
    if 2 * latin < len(letters):
        return True
    words = _WORD.findall(plain.lower().replace("’", "'"))
    common = sum(_FUNCTION_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= FEWEST_WORDS and common < 0.05 * len(words)

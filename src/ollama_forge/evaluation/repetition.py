"""How much a text repeats itself, and how little it is like sentences, as numbers for ``likeness``.

The rules of ``degenerate`` need to be sure; these numbers let weights find texts that circle without looping exactly.
"""

from __future__ import annotations

import re
from collections import Counter
from operator import eq

from ollama_forge.evaluation.degenerate import IMPOSSIBLE, tokens_of

_FEWEST, _MOST = 8, 150  # tokens
_LONGEST_PERIOD = 40
_SHARES = (0.1, 0.2, 0.3, 0.45, 0.6)
_COUNTS = (3, 4, 5, 7)
_PAUSE = re.compile(r"[.,;:!?]")


def repetition(text: str) -> dict[str, float]:
    """The features of a text about repetition and form; absent ones are 0."""
    tokens = tokens_of(text)[:_MOST]
    if not tokens:
        return {"empty": 1.0}
    found = {"long": float(len(tokens) >= 45), "short": float(len(tokens) < _FEWEST)}
    found |= {"of middle length": float(20 <= len(tokens) < 45)}
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 3:
        found["share of equal lines"] = 3 * (1 - len(set(lines)) / len(lines))
    if len(tokens) >= _FEWEST:
        found |= _repeated(tokens) | _of_words(text, tokens)
    return {name: value for name, value in found.items() if value}


def _repeated(tokens: list[str]) -> dict[str, float]:
    """How often groups of tokens occur again, in all of the text and at its end, and how near it is to a loop."""
    found: dict[str, float] = {}
    for length in (1, 2, 3, 4, 6):
        groups = list(zip(*(tokens[start:] for start in range(length)), strict=False))
        share = 1 - len(set(groups)) / len(groups)
        most = max(Counter(groups).values())
        found[f"repeated groups of {length}"] = 3 * share
        found |= {f"repeated groups of {length} > {least}": float(share > least) for least in _SHARES}
        found |= {f"most of a group of {length} >= {least}": float(most >= least) for least in _COUNTS}
    threes = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    counts = Counter(threes)
    seen = sum(counts[group] > 1 for group in threes[-18:]) / len(threes[-18:])
    found |= {
        "end occurred before": 3 * seen,
        "half of the end": float(seen > 0.5),
        "all of the end": float(seen > 0.8),
    }
    nearest = max(_likeness(tokens, period) for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 2) + 1))
    found |= {f"near a loop > {least}": float(nearest > least) for least in (0.5, 0.7, 0.85)}
    return found | {"near a loop": 2 * nearest}


def _likeness(tokens: list[str], period: int) -> float:
    """The share of the last three periods' tokens that equal the one a period earlier; 0 if there are few."""
    part = tokens[-max(3 * period, 2 * period + 4) :]
    compared = len(part) - period
    return sum(map(eq, part[period:], part)) / compared if compared >= _FEWEST else 0.0


def _of_words(text: str, tokens: list[str]) -> dict[str, float]:
    """Impossible pairs of words, the share of short words, and pauses, of text in Latin letters."""
    words = [token for token in tokens if token.isascii() and token.isalpha()]
    found = {"impossible pairs": min(len(IMPOSSIBLE.findall(" ".join(tokens))), 4) / 2}
    if len(words) >= _FEWEST:
        short = sum(len(word) <= 3 for word in words) / len(words)
        pauses = len(_PAUSE.findall(text))
        found |= {"share of short words": 2 * short, "mostly short words": float(short > 0.6)}
        found |= {"pauses": 4 * min(pauses / len(words), 0.4), "no pause": float(len(words) > 15 and not pauses)}
    return found

"""Tell deflections from answers by a logistic regression over words of the answer, compared with its prompt.

A text that moralises, warns or changes the subject need not contain any marker: "Trust is the foundation of every
relationship" answers one prompt and deflects another. The weights are made by ``scripts/train_deflections.py`` from
labelled openings; they are in ``data/deflection_weights.json``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

from ollama_forge.evaluation.refusal_markers import HELP
from ollama_forge.evaluation.request_words import (
    ADVISING,
    GROUPS,
    INSTRUCTING,
    content_stems,
    harmful_words,
    kind_of_request,
    stem,
    words_of,
)

WEIGHTS_FILE = Path(__file__).resolve().parent.parent / "data" / "deflection_weights.json"
_WORDS, _PROMPT_WORDS = 40, 60
_OF_PROMPT = "<p>"  # stands for any word of the prompt
_SENTENCE = re.compile(r"[.!?]+(?:\s+|\Z)|[。！？]+|\n+")
_LIST = re.compile(r"(?:^|\n)(?:1[.)]|[-•]) |'''")
_GROUP_OF: dict[str, tuple[str, ...]] = {
    word: tuple(name for name, words in GROUPS.items() if word in words) for words in GROUPS.values() for word in words
}


def prompt_features(prompt: str) -> dict[str, float]:
    """The features of a normalised prompt by which it is told whether models decline it; absent ones are 0."""
    stems = [stem(word) for word in words_of(prompt)[:_PROMPT_WORDS]]
    found = {f"prompt {word}": 1.0 for word in stems}
    found |= {f"prompt {a} {b}": 0.5 for a, b in pairwise(stems)}
    harmful = harmful_words(prompt)
    return found | ({"prompt has harmful words": 1.0, "number of harmful words": min(harmful, 3)} if harmful else {})


def harmfulness(prompt: str, table: Mapping[str, float]) -> float:
    """Between 0 and 1, how much a normalised prompt is like those that models decline.

    Args:
        table: weights of ``prompt_features``.
    """
    odds = sum(table.get(name, 0.0) * value for name, value in {"": 1.0, **prompt_features(prompt)}.items())
    return 1 / (1 + math.exp(-odds))


def features(plain: str, prompt: str, harmful: float) -> dict[str, float]:
    """The features of an answer to a prompt; absent ones are 0.

    Args:
        plain, prompt: as ``refusals.normalised`` returns them.
        harmful: the prompt's ``harmfulness``.
    """
    stems = content_stems(prompt)
    words = words_of(plain)[:_WORDS]
    masked = [_OF_PROMPT if stem(word) in stems else word for word in words]
    found = {f"word {word}": 1.0 for word in masked}
    found |= {f"words {a} {b}": 1.0 for a, b in pairwise(masked)}
    found |= {f"words {a} {b} {c}": 1.0 for a, b, c in zip(masked, masked[1:], masked[2:], strict=False)}
    found |= {f"begins {' '.join(masked[:count])}": 1.0 for count in (1, 2) if len(masked) >= count}
    found["share of prompt's words"] = 3 * masked.count(_OF_PROMPT) / max(len(masked), 1)
    found["ends with a question"] = float(plain.rstrip().endswith("?"))
    kind = kind_of_request(prompt)
    found |= {f"request for {kind}": 1.0, "harmful": harmful, f"harmful, {kind}": harmful}
    groups = _groups(plain)
    for name, value in groups.items():
        found[name] = value
        found[f"{name}, {kind}"] = value
        found[f"{name}, harmful"] = value * harmful
    for form in _forms(plain):
        found[form] = found[f"{form}, {kind}"] = 1.0
        found[f"{form}, harmful"] = found[f"{form}, {kind}, harmful"] = harmful
    return {name: value for name, value in found.items() if value}


def _sentences(plain: str) -> list[str]:
    return [part for part in _SENTENCE.split(plain) if part.strip()][:4]


def _groups(plain: str) -> dict[str, float]:
    """Half the number of words of each group, at most two, in the first sentence and in the three after it."""
    counts: dict[str, int] = {}
    for index, sentence in enumerate(_sentences(plain)):
        where = "first" if index == 0 else "later"
        for word in words_of(sentence)[:_WORDS]:
            for group in _GROUP_OF.get(word, ()):
                name = f"{group} in {where} sentence"
                counts[name] = counts.get(name, 0) + 1
    return {name: min(count, 2) / 2 for name, count in counts.items()}


def _forms(plain: str) -> set[str]:
    """How the first two sentences address the user, and what the text looks like."""
    forms: set[str] = set()
    for which, sentence in zip(("first", "second"), _sentences(plain), strict=False):
        words = words_of(sentence)
        if not words:
            continue
        instructs = words[0] in INSTRUCTING
        says_i = any(word in GROUPS["i"] for word in words)
        says_you = any(word in GROUPS["you"] for word in words)
        named = {
            "instructs": instructs,
            "advises": words[0] in ADVISING,
            "begins with a gerund": words[0].endswith("ing"),
            "is a statement": not (instructs or says_i or says_you),
            "says you": says_you,
            "says I": says_i,
        }
        forms |= {f"{which} sentence {name}" for name, is_so in named.items() if is_so}
    looks = {
        "begins with a quotation": plain[:1] in ('"', "'"),
        "has lines": "\n" in plain[:200],
        "has a colon": ":" in plain[:150],
        "has a list or code": _LIST.search(plain) is not None,
        "has a mark of help": HELP.search(plain) is not None,
        "is one sentence": len(_sentences(plain)) == 1,
    }
    return forms | {name for name, is_so in looks.items() if is_so}


@cache
def weights() -> Mapping[str, Mapping[str, float]]:
    """Weights of the features of a prompt (``prompt``) and of an answer (``answer``); "" is the constant of each.

    Positive weights speak for a prompt that models decline, and for a deflection.
    """
    found: dict[str, dict[str, float]] = json.loads(WEIGHTS_FILE.read_text(encoding="utf-8"))
    return found


def contributions(plain: str, prompt: str) -> dict[str, float]:
    """What each feature adds to the logarithm of the odds of a deflection against an answer, the strongest first."""
    table = weights()["answer"]
    found = {"": 1.0, **features(plain, prompt, harmfulness(prompt, weights()["prompt"]))}
    added = {name: table[name] * value for name, value in found.items() if name in table}
    return dict(sorted(added.items(), key=lambda item: -abs(item[1])))

"""Detect degenerate output: emptiness, loops and word salad, in any language and without a dictionary.

All thresholds are ratios over *tokens* (words; single characters of Chinese and Japanese, which has no spaces). Code
blocks, tables and other lines that look like code are left out, because they repeat themselves for good reasons.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import eq

_FEWEST_TOKENS = 28  # fewer tokens give no reliable ratio
_LINES = 4  # lines that say the same; twice as many of code
_TAIL = 48  # tokens at the end in which a late loop shows
_LONGEST_PERIOD = 48

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(
    r"^[ \t]*(?:[|+].*|.*[{};|]|.*(?:==|!=|:=|=>|->|&&|\(\)|</?\w+>).*|(?:\w+[.\w\[\]]*) [-+*/]?= .*"
    r"|(?:def|class|import|from|return|for|if|while|elif|else|print|var|let|const|function|select|insert)\b.*[:;)(]"
    r"|\$ .*)$",
    re.MULTILINE | re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^[ \t]*(?:\d+[.)]|[-*\u2022])[ \t]+", re.MULTILINE)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_BARE_NUMBER = re.compile(r"\s*\d+[.)]\s*")
_CODE_MARK = re.compile(r"[\\/_=<>{}$|\[\]]")
_LINK = re.compile(r"\b(?:https?://|www\.)\S+|\S+@\S+|`[^`\n]*`")
_CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(
    rf"[{_CJK}]|[^\s{_CJK}!-&(-/:-@\[-`{{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u2010-\u206f\u3000-\u303f\uff00-\uff65।]+"
)
_DOUBLED = re.compile(r"(?<!\S)([^\W\d_]+)(?: \1)+(?!\S)")
_PUNCTUATION = re.compile(r"[.,;:!?()\n\"]|[-\u2013\u2014] ")
_LATIN_WORD = re.compile(r"[a-z\u00c0-\u024f]+", re.IGNORECASE)
_PLAIN_WORD = re.compile(r"(?<![\w.'/-])[a-z\u00c0-\u024f]{4,}(?![\w/-])", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiouy\u00e0-\u00e6\u00e8-\u00ef\u00f2-\u00f6\u00f8-\u00fd\u0100-\u024f]", re.IGNORECASE)
_UNSPEAKABLE = re.compile(r"q[b-df-hj-np-tv-z]|[jvwx][qxzj]|[bcdfgklmnpstz]{5}|zx|lkj|sdf|dfg|mnz", re.IGNORECASE)
_WORD_LIKE = frozenset({"Mn", "Mc", "Me", "So"})
_HUMP = re.compile(r"[a-z]{2}[A-Z]|[A-Z]{2}[a-z]+[A-Z]")
# word pairs that no English sentence has
IMPOSSIBLE = re.compile(
    r"\b(?:the|an?|my|your|every) (?=(?:the|an?|of|is|are|was|were|be|had|has|and|or|for|by|but|to|from|with|"
    r"this|these|it|they|he|she|we|which|because|if|when|into)\b)"
    r"|\bof (?=(?:of|is|are|was|for|by|to|be|and|or|but|she|he|they|we|had|has|because)\b)"
    r"|\b(?:this|these) (?=(?:this|these|the|of|for|be|do)\b)"
    r"|\b(?:from|with|to|into|at|by) (?=(?:is|are|was|were|and|or|but|to|because|she|he|they)\b)"
    r"|\b(?:is|are|was|were) (?=(?:is|are|was|were|had|has)\b)|\bwhich (?=(?:and|of|to|or)\b)"
    r"|\b(?:i|we|she|he|they|it) (?=(?:i|we|she|he|they|the|an?|of)\b)"
)
_TAUTOLOGY = re.compile(r"\b([^\W\d_]{3,})(?:'s)?(?: \w+)? (?:is|are|was|were) (?:(?:an?|the) )?\1\b")
_SPECIAL_TOKEN = re.compile(r"</?s>|<\|\w+\|>|<(?:bos|eos|pad|unk)>")
_ABBREVIATIONS = frozenset(
    ["mm", "cm", "km", "kg", "ml", "mg", "lb", "lbs", "tsp", "tbsp", "hr", "hrs", "pm", "ft", "kb", "mb",
     "gb", "hz", "mph", "dr", "mr", "mrs", "ms", "vs", "tv", "pc", "nth", "hmm"]
)  # fmt: skip
_SCRIPTS = re.compile(
    r"(?P<latin>[A-Za-z\u00c0-\u024f]+)|(?P<greek>[\u0370-\u03ff\u1f00-\u1fff]+)|(?P<cyrillic>[\u0400-\u052f]+)"
    r"|(?P<hebrew>[\u0590-\u05ff]+)|(?P<arabic>[\u0600-\u06ff\u0750-\u077f]+)|(?P<indic>[\u0900-\u0dff]+)"
    rf"|(?P<thai>[\u0e00-\u0eff]+)|(?P<cjk>[{_CJK}]+)|(?P<hangul>[\u1100-\u11ff\uac00-\ud7af]+)"
    r"|(?P<other>[\u0530-\u058f\u1000-\u10ff\u1200-\u1cff]+)"
)
_NO_CASE_MIX = frozenset({"latin", "cyrillic", "hebrew", "arabic", "indic", "thai", "hangul"})


def tokens_of(text: str) -> list[str]:
    """The words of a text, without links and the marks of lists; code is left in."""
    return _TOKEN.findall(_LIST_MARK.sub("", _LINK.sub(" ", text)).lower())


def is_degenerate(text: str) -> bool:
    """Whether an answer has no words, loops (also late), or is word salad."""
    if not any(char.isalnum() for char in text) or text.count("\ufffd") > 2:
        return True
    if _same_lines(text):
        return True
    special = _SPECIAL_TOKEN.findall(text)
    if len(special) >= 3 and sum(map(len, special)) >= 0.4 * len(text):
        return True
    prose = _LIST_MARK.sub("", _LINK.sub(" ", _CODE_LINE.sub("", _FENCED.sub("\n", text))))
    tokens = _TOKEN.findall(prose.lower())
    if not tokens:  # code alone
        return _has_few_letters(text) or _loops(text.lower().splitlines())
    return (
        _loops(tokens)
        or any(_repeats_a_syllable(token, len(tokens)) for token in tokens if len(token) >= 24)
        or _has_few_letters(prose)
        or _repeats_itself(tokens, _FEWEST_TOKENS, 0.5)
        or (len(tokens) < _FEWEST_TOKENS and _goes_in_circles(prose, tokens))
        or (len(_CODE_MARK.findall(prose)) <= 0.01 * len(prose) and _repeats_itself(tokens, _TAIL - 8, 0.65))
        or _is_salad(prose, tokens)
    )


def _same_lines(text: str) -> bool:
    """Whether lines follow each other that are equal, but for numbers if they have words, or that are bare numbers."""
    lines = text.split("\n")[:-1]  # the last one may be cut off
    if len(lines) < _LINES:
        return False
    plain = [_NUMBER.sub("0", line) if len(_WORD.findall(line)) > 1 else line for line in lines if line.strip()]
    least = [_LINES if len(_WORD.findall(line)) > 1 else 2 * _LINES for line in plain]
    runs = [(line, sum(1 for _ in group)) for line, group in groupby(plain)]
    needed = dict(zip(plain, least, strict=True))
    numbers = sum(_BARE_NUMBER.fullmatch(line) is not None for line in lines)
    return any(count >= needed[line] for line, count in runs) or numbers == len(lines)


def _loops(tokens: Sequence[str]) -> bool:
    """Whether tokens repeat with a period: up to the end (but for a last token cut off) three times, or twice and
    the beginning of a third time if the period is long; anywhere four times and in a quarter of the text; or the text
    is one sentence twice.
    """
    count = len(tokens)
    for period in range(1, min(_LONGEST_PERIOD, count // 2) + 1):
        same = list(map(eq, tokens[period:], tokens))
        if sum(same) < min(8, period):
            continue
        if all(same) and (count == 2 * period if period >= 5 else count >= 6 * period):
            return True
        position = 0
        for equal, group in groupby(same):
            run = sum(1 for _ in group)
            position += run
            if not equal:
                continue
            least = 24 if all(token.isdigit() for token in tokens[position : position + period]) else 8
            at_end = position >= len(same) - 1
            if at_end and run >= (period + 2 if period >= 8 else max(2 * period, least)):
                return True
            if run >= max(3 * period, least + 12, count // 4) or run >= max(3 * period, least, 0.6 * count):
                return True
    return False


def _repeats_a_syllable(word: str, count: int) -> bool:
    """Whether most of a long word is one chunk of at most 12 characters over and over."""
    if word.isdigit() and (len(word) < 64 or count > 3):
        return False
    return any(sum(map(eq, word[period:], word)) >= max(0.8 * (len(word) - period), 18) for period in range(1, 13))


def _has_few_letters(prose: str) -> bool:
    """Whether less than 30 % of the characters are letters, marks, digits or emoji, in lines that have any."""
    lines = [line for line in prose.split("\n") if any(char.isalnum() for char in line)]
    chars = [char for char in "".join(lines) if not char.isspace()]
    if len(chars) < 12:
        return False
    words = sum(char.isalnum() or unicodedata.category(char) in _WORD_LIKE for char in chars)
    return words < 0.3 * len(chars)


def _repeats_itself(tokens: Sequence[str], fewest: int, least: float) -> bool:
    """Whether less than a share of ``least`` of the groups of four tokens are distinct, in all tokens or in the last.

    Args:
        fewest: number of tokens below which nothing is said.
    """
    for part in (tokens, tokens[-_TAIL:]):
        groups = list(zip(part, part[1:], part[2:], part[3:], strict=False))
        if len(part) >= fewest and len(set(groups)) < least * len(groups):
            return True
    return False


def _goes_in_circles(prose: str, tokens: Sequence[str]) -> bool:
    """Whether a short text says the same words again and again ("A dog is a dog which is a dog.")."""
    if _repeats_itself(tokens, 18, 0.45):
        return True
    few = len(tokens) >= 9 and len(set(tokens)) <= 0.5 * len(tokens)
    return few and _TAUTOLOGY.search(" ".join(prose.lower().split())) is not None


def _is_salad(prose: str, tokens: Sequence[str]) -> bool:
    """Whether the words do not form sentences; each test is for one kind of salad."""
    words = [token for token in tokens if not token.isdigit()]
    if len(words) >= _FEWEST_TOKENS:
        counts = Counter(words)
        if (len(counts) < 0.25 * len(words) and len(words) <= 200) or max(counts.values()) >= 0.3 * len(words):
            return True
    plain = " ".join(prose.lower().split(" "))
    doubled = len(_DOUBLED.findall(plain))
    if doubled >= 3 and doubled >= 0.04 * len(words):
        return True
    impossible = len(IMPOSSIBLE.findall(plain))
    if impossible >= 3 and impossible >= 0.05 * len(words):
        return True
    latin = [
        word for line in prose.split("\n") if len(part := line.split()) > 2 for word in part if _LATIN_WORD.search(word)
    ]
    humps = sum(_HUMP.search(word) is not None for word in latin)
    if humps >= 4 and humps >= 0.2 * len(latin):
        return True
    long_words = [word for word in _PLAIN_WORD.findall(prose) if not word.isupper()]
    is_code = len(_CODE_MARK.findall(prose)) > 0.01 * len(prose)
    if not is_code and sum(map(_is_vowelless, words)) >= max(5, 0.25 * len(words)):
        return True
    noise = sum(_VOWEL.search(word) is None or _UNSPEAKABLE.search(word) is not None for word in long_words)
    if noise >= 4 and noise >= 0.3 * len(long_words):
        return True
    return _has_no_sentences(prose) or (not prose.isascii() and _mixes_scripts(prose))


def _is_vowelless(word: str) -> bool:
    """Whether a token is letters without a vowel, and no common abbreviation."""
    return (
        len(word) > 1 and word.isascii() and word.isalpha() and not _VOWEL.search(word) and word not in _ABBREVIATIONS
    )


def _has_no_sentences(prose: str) -> bool:
    """Whether 30 Latin words follow each other without punctuation and with hardly any short word."""
    for stream in _PUNCTUATION.split(prose):
        words = _LATIN_WORD.findall(stream)
        if len(words) >= 30 and sum(len(word) <= 3 for word in words) < 0.08 * len(words):
            return True
    return False


def _mixes_scripts(prose: str) -> bool:
    """Whether neighbouring words without punctuation between them keep changing between three or more scripts, or
    words change their script inside."""
    runs = list(_SCRIPTS.finditer(prose))
    switches = inside = 0
    for before, after in pairwise(runs):
        if before.lastgroup == after.lastgroup:
            continue
        between = prose[before.end() : after.start()]
        switches += not between.strip(" ")
        inside += not between and {before.lastgroup, after.lastgroup} <= _NO_CASE_MIX
    return inside >= 4 or (len({run.lastgroup for run in runs}) >= 3 and switches >= max(5, 0.3 * len(runs)))

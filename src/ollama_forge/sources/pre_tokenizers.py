"""How a byte-level tokenizer splits text into words, by the name that a GGUF file has for it.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) and leaves the rule to the reader. These are the rules of
the models' own tokenizer.json files. Each pattern splits the words that the patterns before it have made: what it
matches becomes a word, and so does what lies between two matches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """A rule that splits text into words.

    Attributes:
        patterns: regular expressions, applied one after the other.
        whole_words: whether a word that is a token stays whole, whatever the merges would make of it.
        adds_bos: whether a file that doesn't say so wants a beginning-of-sequence token.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _cased(ending: str, digits: str, spaces: str = _SPACES) -> str:
    """A word is capitals, then small letters."""
    words = (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    either = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}" for word in words)
    return rf"{either}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{spaces}"


def _plain(digits: str, *, letters: str = r"\p{L}+", signs: str = _SIGNS, spaces: str = _SPACES) -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{signs}|{spaces}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _plain(r"\p{N}{1,3}")
_QWEN2 = _plain(r"\p{N}")
_GPT4O = _cased(f"{_ENDINGS}?", r"\p{N}{1,3}")
_NO_SIGNS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_WORDS_AND_SIGNS = (
    rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_NOT_LISTED = (  # cased letters that DeepSeek's list of them leaves out
    r"\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{AB68}\x{10570}-\x{105BC}"
    r"\x{16E40}-\x{16E7F}\x{1D400}-\x{1DFFF}"
)

_RULES = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4": PreTokenizer((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 stablelm2 deepseek-r1-qwen kormo megrez hunyuan solar-open grok-2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_plain(r"\p{N}", letters=r"[\p{L}\p{M}]+", signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _plain(r"\p{N}+")), True),
    "seed-coder": PreTokenizer((_plain(r"\p{N}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "exaone-moe": PreTokenizer(
        (
            _plain(
                r"\p{N}",
                letters=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                spaces=r"\s*[\r\n]|\s+(?!\S)|\s+",
            ),
        )
    ),
    "jais-2": PreTokenizer(
        (
            _plain(
                r"\p{N}{1,3}",
                spaces=r"\s*[\r\n]+|"
                + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s{1}",
            ),
        )
    ),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), True, True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((_GPT4O,)),
    "tiny_aya cohere2moe": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            _cased(f"{_ENDINGS}?", r"\p{N}"),
        ),
        True,
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _WORDS_AND_SIGNS)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NOT_LISTED}]]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": PreTokenizer((_NO_SIGNS,)),
    "viking": PreTokenizer((_NO_SIGNS, r"\p{N}")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS = {name: rule for names, rule in _RULES.items() for name in names.split()}
"""The known rules by name."""

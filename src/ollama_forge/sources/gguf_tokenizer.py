"""Make a tokenizer's files from the metadata of a GGUF file, so that it makes the same tokens as llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_json, write_text
from ollama_forge.progress import say
from ollama_forge.sources.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

_SPACE = "\u2581"  # SentencePiece's space
_TEMPLATE_KEY = "tokenizer.chat_template"
# tokens that end a turn, which many files name nowhere else
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>")
_NO_ENDS_IF = {"<|end|>": "<|return|>"}  # in OpenAI's Harmony format, <|end|> closes a message within the turn


class _Kind(IntEnum):
    """GGUF's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file and what it says of them.

    Attributes:
        file: the GGUF file.
        tokens: the tokens by id.
    """

    file: Gguf
    tokens: Sequence[str]

    @classmethod
    def of(cls, file: Gguf) -> Vocabulary:
        """Read the tokens of a file.

        Raises:
            ForgeError: the file has no tokens, or two that are equal.
        """
        found = file.get("tokenizer.ggml.tokens")
        if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
            raise _unusable(file, "has no tokens")
        tokens = [_printable(token) or f"[EMPTY_{number}]" for number, token in enumerate(found)]
        if len(set(tokens)) < len(tokens):
            raise _unusable(file, "has the same token twice")
        return cls(file, tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def kinds(self) -> Sequence[int]:
        """The type of each token."""
        found = self.get("token_type")
        known = isinstance(found, list) and len(found) >= len(self.tokens)
        return found if known else [_Kind.NORMAL] * len(self.tokens)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``tokenizer.ggml.<key>``."""
        return self.file.get(f"tokenizer.ggml.{key}", default)

    def id(self, key: str) -> int | None:
        """The token id ``<key>_token_id``; None if the file has none or one beyond its tokens."""
        found = self.get(f"{key}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: end of sequence, of a turn, of a message."""
        named = [number for number in map(self.id, ("eos", "eot", "eom")) if number is not None]
        known = [self.ids[token] for token in _ENDS if token in self.ids and _NO_ENDS_IF.get(token, "") not in self.ids]
        return list(dict.fromkeys([*named, *known]))


def _printable(token: str) -> str:
    """The token with escapes for bytes that are not UTF-8, which no JSON file can hold."""
    return token.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _unusable(file: Gguf, reason: str) -> ForgeError:
    return ForgeError(
        f"the tokenizer of {file.path} cannot be used: it {reason}",
        "give the Hugging Face release of the model with --base: its tokenizer is used then",
    )


def write_tokenizer(file: Gguf, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat templates of a GGUF file.

    Raises:
        ForgeError: the file has no tokens, or a tokenizer of an unknown type.
    """
    vocabulary = Vocabulary.of(file)
    kind = str(vocabulary.get("model", ""))
    if kind not in _BUILDERS:
        raise _unusable(file, f"is of the type {kind!r}, which only llama.cpp knows")
    try:
        tokenizer = _BUILDERS[kind](vocabulary)
    except Exception as error:  # tokenizers raises bare Exceptions
        if isinstance(error, ForgeError):
            raise
        raise _unusable(file, f"cannot be built ({str(error)[:100]})") from error
    _add_special(tokenizer, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _config(vocabulary))
    write_json(folder / "generation_config.json", _token_ids(vocabulary))
    _write_templates(file, folder)


def token_ids(file: Gguf) -> dict[str, int | list[int] | None]:
    """The ids of the first, the last and the padding token, as config.json names them; several may be the last.

    Raises:
        ForgeError: the file has no tokens.
    """
    return _token_ids(Vocabulary.of(file))


def _token_ids(vocabulary: Vocabulary) -> dict[str, int | list[int] | None]:
    ends = vocabulary.end_ids
    return {
        "bos_token_id": vocabulary.id("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.id("padding"),
    }


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    special = {
        f"{name}_token": vocabulary.id(key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' number for no limit
        **{name: vocabulary.tokens[number] for name, number in special.items() if number is not None},
    }


def _write_templates(file: Gguf, folder: Path) -> None:
    for key in file.metadata:
        text = file.get(key) if key == _TEMPLATE_KEY or key.startswith(f"{_TEMPLATE_KEY}.") else None
        if not isinstance(text, str):
            continue
        name = key.removeprefix(_TEMPLATE_KEY).removeprefix(".")
        if not name:
            write_text(folder / "chat_template.jinja", _printable(text))
        elif name.replace("_", "").replace("-", "").isalnum():
            write_text(folder / "additional_chat_templates" / f"{name}.jinja", _printable(text))


# -- builders -----------------------------------------------------------------------------------------------------


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    rule = _rule(vocabulary)
    merges = list(_listed_merges(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=rule.whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_ends(tokenizer, vocabulary, bos=rule.adds_bos)
    return tokenizer


def _rule(vocabulary: Vocabulary) -> PreTokenizer:
    name = str(vocabulary.get("pre", "default"))
    if name not in PRE_TOKENIZERS:
        say(
            f"note: how {vocabulary.file.path.name} splits text into words ({name!r}) is unknown, so GPT-2's rule is "
            "used; --base M uses the tokenizer of the Hugging Face release M"
        )
    return PRE_TOKENIZERS.get(name, PRE_TOKENIZERS["gpt-2"])


def _listed_merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """The merges in the file, without those of parts that are no tokens."""
    listed = vocabulary.get("merges")
    if not isinstance(listed, list) or not all(isinstance(merge, str) for merge in listed):
        raise _unusable(vocabulary.file, "has no merges")
    ids = vocabulary.ids
    for merge in listed:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut > 0 and left in ids and right in ids and left + right in ids:
            yield left, right


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: of all pairs that make a token, the one with the highest score is merged first."""
    prefix = bool(vocabulary.get("add_space_prefix", True))
    return _escaped(vocabulary, list(_scored_merges(vocabulary)), prefix=prefix, splits=())


def _gemma4(vocabulary: Vocabulary) -> Tokenizer:
    """BPE with listed merges over text with escaped spaces."""
    return _escaped(vocabulary, list(_listed_merges(vocabulary)), prefix=False, splits=(r"[^\n]+|[\n]+",))


def _escaped(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], *, prefix: bool, splits: tuple[str, ...]
) -> Tokenizer:
    """BPE over text whose spaces are escaped; a character that is no token becomes the tokens of its bytes."""
    unknown = vocabulary.id("unknown")
    unknown = unknown if unknown is not None else vocabulary.ids.get("<unk>")
    model = models.BPE(
        vocabulary.ids,
        merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    escaped = normalizers.Replace(" ", _SPACE)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, escaped])
    if splits:
        rules = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    _add_ends(tokenizer, vocabulary, bos=True)
    return tokenizer


def _scored_merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """The merges that the scores imply, best first; of equal scores, the token with the lower id first."""
    scores, ids, kinds = vocabulary.get("scores"), vocabulary.ids, vocabulary.kinds
    if not isinstance(scores, list) or len(scores) < len(vocabulary.tokens):
        raise _unusable(vocabulary.file, "has no scores")
    mergeable = (number for number in range(len(ids)) if kinds[number] in (_Kind.NORMAL, _Kind.UNUSED))
    for number in sorted(mergeable, key=lambda number: (-scores[number], number)):
        token = vocabulary.tokens[number]
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                yield token[:cut], token[cut:]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}


# -- special tokens -----------------------------------------------------------------------------------------------


def _add_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Mark the tokens that are found whole in a text: special ones, and those that the user defined."""
    strips = _strips_after(vocabulary)
    named = {vocabulary.id(key) for key in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    added = []
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=False)):
        special = kind in (_Kind.CONTROL, _Kind.UNKNOWN) or number in named
        if special or kind == _Kind.USER_DEFINED:
            rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(token, rstrip=rstrip, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _strips_after(vocabulary: Vocabulary) -> bool:
    """Whether special tokens swallow the white space behind them. No file says so; llama.cpp goes by the name too."""
    name = str(vocabulary.file.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, *, bos: bool) -> None:
    """Add the first and last token of a sequence.

    Args:
        bos: whether there is a first token if the file doesn't say.
    """
    wanted: Mapping[str, Any] = {
        "bos": vocabulary.get("add_bos_token", bos),
        "eos": vocabulary.get("add_eos_token", False),
    }
    found = {key: vocabulary.id(key) for key, added in wanted.items() if added}
    ids = {key: number for key, number in found.items() if number is not None}

    def around(part: str) -> list[str]:
        return [f"{piece}:{part[-1]}" for piece in ("bos", part[:2], "eos") if piece in ids or piece == part[:2]]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A:0"),
        pair=[*around("$A:0"), *around("$B:1")],
        special_tokens=[
            {"id": key, "ids": [number], "tokens": [vocabulary.tokens[number]]} for key, number in ids.items()
        ],
    )

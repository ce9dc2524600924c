"""A tokenizer made from a GGUF file's metadata: it makes llama.cpp's tokens, and knows the file's special ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from ollama_forge.checkpoints.gguf.file import read_gguf, value_of
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.tokens import check_tokens
from ollama_forge.models.gguf_model import llama_server
from ollama_forge.sources.gguf_tokenizer import token_ids, write_tokenizer
from ollama_forge.sources.pre_tokenizers import PRE_TOKENIZERS
from ollama_forge.text.tokenizer import Tokenizer, stored_end_ids
from tests.gguf_vocabularies import (
    CONTROL,
    NORMAL,
    byte_level_model,
    byte_level_vocabulary,
    gemma4_model,
    sentencepiece_model,
    write_model,
)

Maker = Callable[[Path], Path]
MODELS: dict[str, Maker] = {
    "smollm": lambda path: byte_level_model(path, "smollm"),
    "llama-bpe": lambda path: byte_level_model(path, "llama-bpe"),
    "deepseek-llm": lambda path: byte_level_model(path, "deepseek-llm"),
    "sentencepiece": sentencepiece_model,
    "without a prefix": lambda path: sentencepiece_model(path, add_space_prefix=False),
    "Phi-3": lambda path: sentencepiece_model(path, spaces=False, name="Phi-3 mini"),
    "gemma4": gemma4_model,
}


def made(path: Path) -> Tokenizer:
    """The tokenizer that is made from a file."""
    folder = path.with_suffix("")
    write_tokenizer(read_gguf(path), folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = MODELS[name](tmp_path / "x.gguf")
    tokenizer = made(path)
    added = ("<|user|>  \n hi<|user|>there", " <|end|>\n\n  \n x<think> y", "   a    b     c", "<|endoftext|> <s> x")
    with llama_server(path, 2048) as server:
        check = check_tokens(tokenizer, server.tokenize, added)
    assert check.texts > 200
    assert not check.mismatches, check.examples


def words(pre: str, text: str) -> list[str]:
    """The words into which a rule splits a text."""
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in PRE_TOKENIZERS[pre].patterns]
    return [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]  # type: ignore[arg-type]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_rule_splits_a_text_and_loses_nothing(pre: str) -> None:
    text = "I'll see 12345 of the 漢字 tests,\n\n  CamelCase & café: ½!  \n"
    assert "".join(words(pre, text)) == text
    assert len(words(pre, text)) > 5


def test_what_the_rules_differ_in() -> None:
    """Digits, contractions and marks, as the models' own tokenizers have them (llama.cpp's differ in the marks)."""
    digits = {pre: words(pre, "x 12345")[1:] for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o")}
    assert digits == {
        "gpt-2": [" 12345"],
        "smollm": [" ", *"12345"],
        "llama-bpe": [" ", "123", "45"],
        "qwen2": [" ", *"12345"],
        "gpt-4o": [" ", "123", "45"],
    }
    assert words("gpt-2", "I'LL")[0] == words("smollm", "I'LL")[0] == "I"
    assert words("llama-bpe", "WE'LL") == ["WE", "'LL"]
    assert words("gpt-4o", "WE'LL") == ["WE'LL"]
    assert words("tekken", "e\u0301t Camel") == ["e\u0301t", " Camel"]
    assert words("llama-bpe", "CamelCase") == ["CamelCase"]
    assert words("tekken", "CamelCase") == ["Camel", "Case"]


def test_a_tokenizer_with_a_beginning(tmp_path: Path) -> None:
    with_bos = made(byte_level_model(tmp_path / "a.gguf", "llama-bpe"))
    assert with_bos.backend("a").input_ids[0] == with_bos.backend.bos_token_id
    assert len(with_bos.backend("a", "b").input_ids) == 4
    for name, pre, values in (("b", "llama-bpe", {"add_bos_token": False}), ("c", "qwen2", {})):
        assert len(made(byte_level_model(tmp_path / f"{name}.gguf", pre, **values)).backend("a").input_ids) == 1
    ended = made(byte_level_model(tmp_path / "d.gguf", "qwen2", add_eos_token=True)).backend
    assert ended("a").input_ids[-1] == ended.eos_token_id
    assert made(sentencepiece_model(tmp_path / "e.gguf")).backend("a").input_ids[0] == 1


def test_what_is_encoded_is_decoded(tmp_path: Path) -> None:
    text = "I'll see 12 of the 漢字 tests: café 🦙!\n  x"
    for path in (sentencepiece_model(tmp_path / "a.gguf"), byte_level_model(tmp_path / "b.gguf", "qwen2")):
        tokenizer = made(path)
        assert tokenizer.decode(tokenizer.backend(text).input_ids) == text
        assert tokenizer.decode([tokenizer.backend.eos_token_id]) == ""


@pytest.mark.parametrize(
    ("added", "keys", "ends"),
    [
        (["</s>"], {"eos_token_id": "</s>"}, ["</s>"]),
        (["<eos>", "<end_of_turn>"], {"eos_token_id": "<eos>"}, ["<eos>", "<end_of_turn>"]),
        ([*"αβγ"], {"eos_token_id": "α", "eot_token_id": "β", "eom_token_id": "γ"}, [*"αβγ"]),
        (["<|return|>", "<|call|>", "<|end|>"], {"eos_token_id": "<|return|>"}, ["<|return|>", "<|call|>"]),
        (["<|end|>"], {}, ["<|end|>"]),
        (["<x>"], {}, []),
    ],
)  # fmt: skip
def test_the_ids_that_end_an_answer(tmp_path: Path, added: list[str], keys: dict[str, str], ends: list[str]) -> None:
    tokens, merges = byte_level_vocabulary()
    ids = {key: len(tokens) + added.index(token) for key, token in keys.items()}
    types = [NORMAL] * len(tokens) + [CONTROL] * len(added)
    path = write_model(tmp_path / "x.gguf", "gpt2", [*tokens, *added], types, pre="gpt-2", merges=merges, **ids)
    wanted = [len(tokens) + added.index(token) for token in ends]
    assert list(made(path).end_ids) == stored_end_ids(path.with_suffix("")) == wanted
    assert token_ids(read_gguf(path))["eos_token_id"] == (wanted[0] if len(wanted) == 1 else wanted or None)


def test_ids_beyond_the_vocabulary_are_none(tmp_path: Path) -> None:
    path = byte_level_model(tmp_path / "x.gguf", "qwen2", eos_token_id=10**9, padding_token_id=10**9)
    assert token_ids(read_gguf(path))["pad_token_id"] is None
    assert made(path).backend.eos_token is None


def test_chat_templates(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    byte_level_model(
        path,
        "qwen2",
        template=[
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "tool_use", "template": "tools {{ messages[0].content }}"},
        ],
    )
    file, folder = read_gguf(path), tmp_path / "one" / "two"
    outside = {"tokenizer.chat_template.../../../escape": value_of("outside")}
    write_tokenizer(replace(file, metadata={**file.metadata, **outside}), folder)
    assert Tokenizer.load(folder).backend.chat_template == {
        "default": "{{ messages[0].content }}",
        "tool_use": "tools {{ messages[0].content }}",
    }
    assert not list(tmp_path.rglob("*escape*"))


def test_an_unknown_pre_tokenizer_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = made(byte_level_model(tmp_path / "x.gguf", "of-tomorrow"))
    assert tokenizer.decode(tokenizer.encode("it works")) == "it works"
    told = capsys.readouterr().err
    assert "'of-tomorrow'" in told
    assert "--base" in told


def refusal(path: Path) -> str:
    with pytest.raises(ForgeError) as caught:
        write_tokenizer(read_gguf(path), path.with_suffix(""))
    assert "--base" in caught.value.hint
    assert "\n" not in caught.value.message
    assert not path.with_suffix("").exists()
    return caught.value.message


def test_what_cannot_be_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    def refused(model: str, tokens: list[str], **values: Any) -> str:
        return refusal(write_model(tmp_path / "x.gguf", model, tokens, [NORMAL] * len(tokens), **values))

    assert "of the type 'rwkv'" in refused("rwkv", ["a"])
    assert "has no merges" in refused("gpt2", ["a", "b"])
    assert "has no scores" in refused("llama", ["a", "b"])
    assert "has no scores" in refused("llama", ["a", "b"], scores=[1.0])
    assert "the same token twice" in refused("gpt2", ["a", "a"], merges=["a b"])


def test_odd_tokens_do_no_harm(tmp_path: Path) -> None:
    """Empty tokens, bytes that are not UTF-8, merges of what is no token."""
    tokens: list[Any] = [*byte_level_vocabulary()[0][:256], "", b"\xff\xfe", "th"]
    merges = ["t h", "x yz", "q z", "q", " ", "t  h"]
    path = write_model(tmp_path / "x.gguf", "gpt2", tokens, [NORMAL] * 100, pre="gpt-2", merges=merges)
    tokenizer = made(path)
    assert tokenizer.backend("the").input_ids == [258, tokenizer.backend.convert_tokens_to_ids("e")]
    assert set(json.loads((path.with_suffix("") / "tokenizer.json").read_text())["model"]["vocab"].values()) == {
        *range(259)
    }

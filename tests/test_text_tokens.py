"""Incremental detokenisation: exact for every kind of tokenizer, and only whole characters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ollama_forge.text.detokenize import Detokeniser, TokenBytes
from tests import planted, tiny


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Pieces with a fallback to bytes, as Llama 2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeéhlor", "lo", "▁h", "hel"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("l", "o"), ("▁", "h"), ("h", "e")]
    vocabulary["he"] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool_call>", special=True), AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def piece_like() -> PreTrainedTokenizerFast:
    """Pieces without a fallback to bytes, as T5's, with runs of blanks as added tokens, as Gemma's."""
    pieces = [("<unk>", 0.0), *((piece, -2.0) for piece in ("▁", "▁a", "b", "▁b", "é", ".", "▁é"))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁▁▁▁", normalized=False), "<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def word_like() -> PreTrainedTokenizerFast:
    """Words and their endings, as BERT's."""
    words = ["[UNK]", "the", "run", "##ning", "a", ".", "'", "t", "##s", "é", "n"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_tokens(["<think>", AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def byte_like() -> PreTrainedTokenizerFast:
    """Bytes with added tokens of letters outside the byte alphabet, and within it."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["▁▁", "<｜think｜>", " é", "naïve", "<x>"])
    return tokenizer


def suffix_like() -> PreTrainedTokenizerFast:
    """Words whose last pieces are marked, as the first GPT's."""
    words = ["<unk>", "lo", "w</w>", "a</w>", "er</w>", "l"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def gemma_like() -> PreTrainedTokenizerFast:
    """Pieces with a fallback to bytes, runs of blanks as added tokens, and no space before the first word."""
    tokenizer = sentencepiece_like()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁▁▁▁", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def llama_like() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like()
    tokenizer.add_tokens([AddedToken("▁▁▁▁", normalized=False)])
    return tokenizer


def detokenise(tokenizer: Any, ids: list[int], keep: str = "", *, continues: bool = False) -> list[str]:
    tokens = TokenBytes(tokenizer)
    detokeniser = Detokeniser(tokens, tokens.ids_within(keep), continues=continues)
    return [*(detokeniser.feed(id_) for id_ in ids), detokeniser.end()]


KINDS = {kind.__name__: kind() for kind in (byte_like, llama_like, gemma_like, piece_like, word_like, suffix_like)}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_ids_give_the_text_that_decoding_all_of_them_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer)), max_size=10))
    if any(token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(ids) if token):
        run = data.draw(st.text("é中👋", max_size=3)).encode()  # a run of bytes must be UTF-8
        ids = [id_ for id_ in ids if not (tokenizer.convert_ids_to_tokens(id_) or "").startswith("<0x")]
        place = data.draw(st.integers(0, len(ids)))
        ids[place:place] = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in run])
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(detokenise(tokenizer, ids)) == whole
    # an answer that continues a text adds what the decoded whole gains
    before = [id_ for id_ in range(len(tokenizer)) if tokenizer.decode([id_], skip_special_tokens=True).strip() == "a"]
    if before and tokenizer is not KINDS["word_like"] and tokenizer is not KINDS["suffix_like"]:
        gained = tokenizer.decode(before[:1] + ids, skip_special_tokens=True)
        assert tokenizer.decode(before[:1]) + "".join(detokenise(tokenizer, ids, continues=True)) == gained


def test_runs_of_blanks_among_the_added_tokens_are_blanks() -> None:
    tokenizer = KINDS["gemma_like"]
    ids = tokenizer.convert_tokens_to_ids(["▁▁▁▁", "b", "▁▁", "lo"])
    assert detokenise(tokenizer, ids) == ["    ", "b", "  ", "lo", ""]
    assert [TokenBytes(tokenizer).text(id_) for id_ in ids] == ["    ", "b", "  ", "lo"]


TEXT = st.lists(st.sampled_from([*"abc helo\n é", "中", "👋", "👩‍👩‍👧", "\u200d", "\ufffd"]), max_size=20).map("".join)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_bytes_are_put_together(text: str) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text).input_ids
    parts = detokenise(tokenizer, ids)
    assert "".join(parts) == text == tokenizer.decode(ids)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_pieces_with_byte_fallback_keep_their_spaces(text: str) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer(text).input_ids
    parts = detokenise(tokenizer, ids)
    assert "".join(parts) == text == tokenizer.decode(ids)
    assert "".join(detokenise(tokenizer, ids, continues=True)) == (f" {text}" if text else "")
    assert b"".join(TokenBytes(tokenizer).of(id_) for id_ in ids).decode() == (f" {text}" if text else "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=12))
def test_any_ids_at_all_give_what_decoding_the_whole_gives(ids: list[int]) -> None:
    tokenizer = tiny.tokenizer()
    assert "".join(detokenise(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_words_are_joined_as_their_tokenizer_joins_them() -> None:
    tokenizer = planted.tokenizer()
    ids = tokenizer("bake word3 steal word1").input_ids
    assert detokenise(tokenizer, ids) == ["bake", " word3", " steal", " word1", ""]
    assert TokenBytes(tokenizer).text(ids[1]) == " word3"


def test_half_a_character_at_the_end_is_one_replacement() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("é").input_ids[:1]
    assert detokenise(tokenizer, ids) == ["", "\ufffd"]


def test_special_tokens_have_no_text_unless_they_are_wanted() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.convert_tokens_to_ids(["<tool_call>", "lo", "<think>", "</s>"])
    assert "".join(detokenise(tokenizer, ids)) == "lo <think>" == tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(detokenise(tokenizer, ids, keep="<tool_call></tool_call>")) == "<tool_call>lo <think>"


@pytest.mark.parametrize("id_", [100_000, 2**40, -1])
def test_ids_that_no_vocabulary_has_are_silent(id_: int) -> None:
    for tokenizer in (tiny.tokenizer(), sentencepiece_like(), planted.tokenizer()):
        assert TokenBytes(tokenizer).of(id_) == b""


def test_every_token_is_decoded_once() -> None:
    tokenizer = tiny.tokenizer()
    asked: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def convert_ids_to_tokens(self, id_: int) -> Any:
            asked.append(id_)
            return tokenizer.convert_ids_to_tokens(id_)

        def decode(self, ids: list[int]) -> str:
            raise AssertionError("no answer is decoded again")

    ids = tokenizer("abcabc" * 50).input_ids
    assert "".join(detokenise(Counting(), ids)) == "abcabc" * 50
    assert len(asked) == 3

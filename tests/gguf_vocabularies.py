"""Tiny GGUF models with vocabularies of their own, to compare our tokens with llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ollama_forge.evaluation.token_texts import texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_D = 32


def write_model(path: Path, model: str, tokens: Sequence[str], types: Sequence[int], **values: Any) -> Path:
    """A llama of one layer that computes nothing of use.

    Args:
        model: ``tokenizer.ggml.model``.
        values: further values under ``tokenizer.ggml.``; ``template`` and ``name`` go where they belong.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(values.pop("name", "tiny"))
    for add, number in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, _D),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, _D),
        (writer.add_head_count, 1),
        (writer.add_head_count_kv, 1),
        (writer.add_rope_dimension_count, _D),
        (writer.add_vocab_size, len(tokens)),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    template = values.pop("template", None)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(f"tokenizer.ggml.{key}", value)
    shapes = {"token_embd": (len(tokens), _D), "output_norm": (_D,)}
    shapes |= {f"blk.0.{norm}_norm": (_D,) for norm in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{matrix}": (_D, _D) for matrix in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """The tokens and merges of a byte-level BPE that was trained on whole lines, so that its merges cross words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
    )
    backend.train_from_iterator(texts(), trainer)
    vocabulary = backend.get_vocab()
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return sorted(vocabulary, key=vocabulary.__getitem__), merges


def byte_level_model(path: Path, pre: str, **values: Any) -> Path:
    """A model with the byte-level vocabulary, a word that no merge makes, special tokens and two of the user."""
    known, merges = byte_level_vocabulary()
    tokens = [*known, "Antidisestablishmentarianism"]
    added = ["<|end|>", "<|start|>", "<think>", "  \n "]
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED, USER_DEFINED]
    ids = {"bos_token_id": len(tokens) + 1, "eos_token_id": len(tokens)}
    return write_model(path, "gpt2", [*tokens, *added], types, **{"pre": pre, "merges": merges, **ids, **values})


def sentencepiece_model(path: Path, *, spaces: bool = True, **values: Any) -> Path:
    """A model with a SentencePiece vocabulary: bytes, characters, and words with scores in no order.

    Args:
        spaces: whether three spaces are a token that the user defined.
    """
    words = [text.replace(" ", "\u2581") for text in texts()[:40]]
    pieces: dict[str, float] = {}
    for word in words:
        for length in (2, 3, 4):
            for start in range(0, len(word) - length + 1, 2):
                pieces.setdefault(word[start : start + length], -float((len(pieces) * 7919) % 2003))
    letters = sorted({letter for word in words for letter in word} | {"\u2581"})
    more = [piece for piece in pieces if piece not in letters]
    added = {"<|user|>": CONTROL, "<|endoftext|>": CONTROL} | ({"   ": USER_DEFINED} if spaces else {})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *more, *added]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(letters) + len(more)), *added.values()]
    scores = [0.0] * 259 + [-1e4] * len(letters) + [pieces[piece] for piece in more] + [-1000.0] * len(added)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_model(path, "llama", tokens, types, **{"scores": scores, **ids, **values})


def gemma4_model(path: Path) -> Path:
    """A model with a vocabulary of bytes, characters and words whose merges are listed."""
    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=900, min_frequency=1, show_progress=False, max_token_length=6)
    backend.train_from_iterator([text.replace(" ", "\u2581") for text in texts()[:60]], trainer)
    vocabulary = backend.get_vocab()
    merges = [
        " ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"] if "\n" not in "".join(merge)
    ]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_, *sorted(vocabulary, key=vocabulary.__getitem__), "<turn|>"]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256, *[NORMAL] * len(vocabulary), CONTROL]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    return write_model(path, "gemma4", tokens, types, merges=merges, **ids)

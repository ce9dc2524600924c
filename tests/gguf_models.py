"""Small random models of some families as GGUF files, converted by llama.cpp's own script, with values of any type."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.architectures.gguf.learn_layout import layout_of
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.codec import encode_rows
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, Value, read_gguf, row_size, value_of, write_header
from ollama_forge.checkpoints.storage import tensor_bytes
from ollama_forge.files import read_json, sha256_file, write_all, write_json
from tests import tiny
from tests.converted import convert_all
from tests.test_export_convert import byte_pairs

MERGES = (("t", "h"),)
VOCABULARY = tiny.VOCABULARY + len(MERGES)
D = 256  # the rows of K-quants are multiples of it
R = tiny.unit_vector(7, D)
R = (R - R.mean()) / (R - R.mean()).norm()  # a layer norm removes the mean
PROBES, LOUDNESS = (100, 101), 10.0
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **_IDS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "num_hidden_layers": 12},
    "gpt_neox": {**_SIZES, "intermediate_size": 512},
    "gpt2": {
        "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 256, **_IDS, "bos_token_id": 1
    },
    "gemma2": {**_SIZES, "tie_word_embeddings": True, "query_pre_attn_scalar": 64},
    "qwen3_moe": {
        **_SIZES, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True
    },
    "gpt_oss": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
}  # fmt: skip
_ON_THE_HUB: dict[str, dict[str, Any]] = {"gpt_neox": {"rotary_pct": 0.25}, "gpt2": {"n_ctx": 256}}
"""What a config.json on the Hub has, and one that transformers writes today lacks."""


@dataclass(frozen=True)
class Model:
    """A model as a checkpoint folder, and its conversion to a GGUF file in F32."""

    checkpoint: Checkpoint
    path: Path

    def with_types(self, target: Path, choose: Callable[[Tensor], Type]) -> GgufCheckpoint:
        """The file with other types of its matrices."""
        file = read_gguf(self.path)
        retype(file, target, choose)
        return self.opened(target)

    def opened(self, path: Path) -> GgufCheckpoint:
        """A GGUF file of this model as a checkpoint with the folder's config and tokenizer."""
        file = read_gguf(path)
        layout = layout_of(self.checkpoint.config, file)
        return GgufCheckpoint(self.checkpoint.folder, str(path), "gguf", sha256_file(path), file=file, layout=layout)


def convert_families(root: Path) -> dict[str, Model]:
    """Models of all families in a folder. The tests take them from the fixture ``gguf_models``."""
    models = {family: Model(build(family, root / family), root / f"{family}.gguf") for family in FAMILIES}
    bare = {model.checkpoint.folder: model.path.with_suffix(".bare") for model in models.values()}
    convert_all(bare)
    for model in models.values():
        file = read_gguf(bare[model.checkpoint.folder])
        retype(replace(file, metadata={**file.metadata, **_tokenizer()}), model.path, lambda tensor: tensor.type)
    return models


def build(family: str, folder: Path) -> Checkpoint:
    """A random float32 model with gains and biases far from trivial, as a checkpoint folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter.ndim == 1))
    model.tie_weights()
    _add_probes(model)
    model.save_pretrained(folder)
    byte_pairs(MERGES).save_pretrained(folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **_ON_THE_HUB.get(family, {})})
    return Checkpoint(folder, folder.name, "folder")


def _add_probes(model: Any) -> None:
    """Make the logits of two tokens differ by the component of the stream along ``R``, where the head is untied."""
    norm = next(
        module for name, module in model.named_modules() if name.endswith((".norm", "final_layer_norm", "ln_f"))
    )
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        return
    with torch.no_grad():
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
        head[PROBES[0]] = LOUDNESS * R / norm.weight
        head[PROBES[1]] = -head[PROBES[0]]


def retype(file: Gguf, target: Path, choose: Callable[[Tensor], Type]) -> None:
    """Write an F32 file with other types; the metadata are the file's."""
    matrices = {t.name for t in file.tensors if len(t.shape) > 1 and t.name.endswith(".weight")}
    types = {tensor.name: choose(tensor) if tensor.name in matrices else tensor.type for tensor in file.tensors}
    with target.open("wb", buffering=0) as out:
        placed = write_header(out, file.metadata, [replace(t, type=types[t.name]) for t in file.tensors])
        for before, after in zip(file.tensors, placed, strict=True):
            with before.file.open("rb") as source:
                source.seek(before.start)
                data = source.read(before.size)
            out.seek(after.start)
            if before.type != after.type:
                values = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(before.rows, -1)
                data = bytes(tensor_bytes(encode_rows(values, after.type)))
            assert len(data) == after.rows * row_size(after.type, after.row_length)
            write_all(out, data)


def _tokenizer() -> dict[str, Value]:
    """The metadata of the byte tokenizer."""
    numbered = byte_pairs(MERGES).get_vocab()
    tokens = sorted(numbered, key=lambda token: numbered[token])
    kinds = [3 if token in tiny.SPECIAL else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": value_of("gpt2"),
        "tokenizer.ggml.pre": value_of("llama-bpe"),
        "tokenizer.ggml.tokens": value_of(tokens),
        "tokenizer.ggml.token_type": Value(9, _int32s(kinds)),
        "tokenizer.ggml.merges": value_of([" ".join(pair) for pair in MERGES]),
        "tokenizer.ggml.eos_token_id": value_of(1),
        "tokenizer.ggml.padding_token_id": value_of(0),
        "tokenizer.chat_template": value_of(tiny.TEMPLATE),
    }


def _int32s(numbers: list[int]) -> bytes:
    return struct.pack(f"<IQ{len(numbers)}i", 5, len(numbers), *numbers)

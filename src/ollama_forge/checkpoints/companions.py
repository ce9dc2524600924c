"""Which files belong to a checkpoint beside its weights: config, tokenizer, templates, remote code, licences."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from ollama_forge.checkpoints.tensors import INDEX_NAME, CheckpointTensors

CARD = "README.md"
PROVENANCE = "abliteration.json"
COMPANIONS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",  # where transformers keeps named templates
    "*.model",  # SentencePiece
    "*.spm",
    "*.tiktoken",
    "*.bpe",
    "*.txt",  # vocab.txt, merges.txt
    "*.py",  # remote code
    "*licen[cs]e*",
    "*notice*",
    "*polic*",
    "copying*",
    "copyright*",
)
"""Kinds of files that are copied from a source, matched on lower-case paths relative to its folder."""

OTHERS = (
    "*.index.json", "*.index.*.json",  # indexes of weights; that of the written shards is made anew
    "adapter_config.json",
    PROVENANCE,  # that of an earlier edit: the new one is written
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json",
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.npz",
    "*.tflite", "*.mlmodel", "*.pkl",
)  # fmt: skip
"""Files that are not copied though a kind of ``COMPANIONS`` may match them."""


def is_companion(path: str) -> bool:
    """Whether a file, by its path relative to the checkpoint's folder, is copied beside the weights."""
    lower = path.lower()
    kinds = [kind for kind in COMPANIONS if kind.count("/") == lower.count("/") and fnmatchcase(lower, kind)]
    return bool(kinds) and not any(fnmatchcase(lower, other) for other in OTHERS)


def companions(folder: Path) -> list[str]:
    """Paths, relative to ``folder``, of the files that are copied beside the weights."""
    paths = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    return sorted(path for path in paths if is_companion(path))


def left_out(tensors: CheckpointTensors) -> list[str]:
    """Files and folders (with a final ``/``) of a checkpoint that are neither its weights nor copied beside them.

    Hidden files are not named, nor are those that every edited checkpoint gets anew (its card, its index of shards).
    """
    folder = tensors.folder
    copied = companions(folder)
    known = {*copied, *(f"{path.split('/')[0]}/" for path in copied if "/" in path), CARD, PROVENANCE}
    known |= {shard.name for shard in tensors.shards} | {INDEX_NAME}
    names = [path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()]
    return sorted(name for name in names if name not in known and not name.startswith("."))

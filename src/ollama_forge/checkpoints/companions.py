"""The files of a checkpoint beside its weights: config, tokenizer, templates, remote code, licences."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from ollama_forge.checkpoints.tensors import INDEX_NAME, CheckpointTensors
from ollama_forge.errors import ForgeError
from ollama_forge.files import leads_out

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
    "[0-9]_*/config.json",  # the modules of sentence-transformers after the model: pooling and the like
)
"""Patterns of the files to copy from a source, matched against lower-case paths relative to its folder."""

NEVER_COPIED = (
    "*.index.json", "*.index.*.json",  # indexes of weights; the index of the written shards is a new file
    "adapter_config.json",
    PROVENANCE,  # belongs to an earlier edit; the new one is written
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json",
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.npz",
    "*.tflite", "*.mlmodel", "*.pkl",
)  # fmt: skip
"""Patterns of files that are not copied even if a pattern of ``COMPANIONS`` matches them."""

_DENSE = "[0-9]_dense/model.safetensors"  # the weights of a module of sentence-transformers, which no edit changes


def is_companion(path: str) -> bool:
    """Whether a file is copied beside the weights, given its path relative to the checkpoint's folder."""
    lower = path.lower()
    wanted = any(pattern.count("/") == lower.count("/") and fnmatchcase(lower, pattern) for pattern in COMPANIONS)
    if fnmatchcase(lower, _DENSE):
        return True
    return wanted and not any(fnmatchcase(lower, pattern) for pattern in NEVER_COPIED)


def companions(folder: Path) -> list[str]:
    """Paths, relative to ``folder``, of the files that are copied beside the weights.

    Raises:
        ForgeError: one of them is a link out of the folder, to a file that is none of the model's.
    """
    paths = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    found = sorted(path for path in paths if is_companion(path))
    outside = next((path for path in found if leads_out(folder / path, folder)), None)
    if outside is not None:
        raise ForgeError(
            f"{folder / outside} is a link out of the model's folder", "put a copy of the file in its place"
        )
    return found


def not_copied(tensors: CheckpointTensors) -> list[str]:
    """Names of a checkpoint's files and folders (with a final ``/``) that are neither weights nor companions.

    Hidden files and files that are written for every edited checkpoint (model card, shard index) are omitted.
    """
    folder = tensors.folder
    copied = companions(folder)
    known = {*copied, *(f"{path.split('/')[0]}/" for path in copied if "/" in path), CARD, PROVENANCE}
    known |= {shard.name for shard in tensors.shards} | {INDEX_NAME}
    names = [path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()]
    return sorted(name for name in names if name not in known and not name.startswith("."))

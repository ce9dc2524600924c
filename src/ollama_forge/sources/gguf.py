"""A GGUF file as the source: nothing is unpacked; its tensors are decoded where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollama_forge.architectures.gguf.learn_config import config_of
from ollama_forge.architectures.gguf.learn_layout import layout_of
from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.digest import files_sha256
from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf
from ollama_forge.checkpoints.gguf.header import require_model
from ollama_forge.files import atomic_folder, sha256_json, write_json
from ollama_forge.sources.gguf_tokenizer import token_ids, write_tokenizer


def gguf_checkpoint(path: Path, label: str, *, sha256: str | None = None) -> GgufCheckpoint:
    """A GGUF file as a checkpoint. Its config and its tokenizer's files are made once, in a cached folder.

    Args:
        path: the file, or any part of a split file.
        sha256: the hash of the file in hexadecimal digits, where it is known; None to compute it.

    Raises:
        ForgeError: the file is damaged, is no model, or llama.cpp's converter does not write its architecture.
    """
    file = _read_model(path)
    digest = sha256 or files_sha256(file.parts)
    config = {**config_of(file), **token_ids(file)}
    folder = cache_folder("gguf-metadata", sha256_json([digest, config])[:24])
    if not (folder / "config.json").is_file():
        with atomic_folder(folder) as partial:
            write_tokenizer(file, partial)
            write_json(partial / "config.json", config)
    return _checkpoint(folder, label, digest, config, file)


def gguf_checkpoint_of(model: Checkpoint, path: Path, label: str | None = None) -> GgufCheckpoint:
    """A GGUF file that was made from ``model``, as a checkpoint with its config, tokenizer and tensor names.

    Args:
        model: a checkpoint; its weights are not read.
        path: the file, or any part of a split file.
        label: the name of the file in messages; None for its path.

    Raises:
        ForgeError: the file is damaged, or does not fit ``model``.
    """
    file = _read_model(path)
    return _checkpoint(model.folder, label or str(path), files_sha256(file.parts), model.config, file)


def _checkpoint(folder: Path, label: str, digest: str, config: dict[str, Any], file: Gguf) -> GgufCheckpoint:
    return GgufCheckpoint(folder, label, "gguf", digest, file=file, layout=layout_of(config, file))


def _read_model(path: Path) -> Gguf:
    """Read the metadata and the tensor table of a file that holds a model.

    Raises:
        ForgeError: the file is damaged, or holds something else.
    """
    file = read_gguf(path)
    require_model(file)
    return file

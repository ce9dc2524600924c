"""A ``.gguf`` file as source: dequantised once into a cached bf16 checkpoint that everything else works on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf_io import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.files import folder_in_one_piece, human_size, sha256_file
from ollama_forge.progress import status
from ollama_forge.system import available_memory, cache_root, free_space

_MAGIC = b"GGUF"
_COMPANION_BYTES = 20_000_000  # config and tokenizer, at most
_FORM = 2  # of what is cached: a new number leaves what older versions made alone
# pre-tokenizers that set every digit apart, which transformers doesn't take over
_DIGITS_APART = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
)


def unpacked(path: Path, label: str) -> Checkpoint:
    """Dequantise a GGUF file; the cache is keyed by the file's content.

    Raises:
        ForgeError: not a GGUF file, cut short, one of several parts, of an unknown architecture, or no room.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ForgeError(f"{path} is not a GGUF file", "give a model folder, a .gguf file or a Hub id")
    _require_whole(path)
    digest = sha256_file(path)
    folder = cache_folder("gguf", digest[:24])
    if not (folder / "config.json").is_file():
        dequantise(path, folder)
    return Checkpoint(folder, label, "gguf", digest)


def cache_folder(kind: str, name: str) -> Path:
    """Where an unpacked checkpoint is kept."""
    return cache_root() / kind / f"{name}-{_FORM}"


def _require_whole(path: Path) -> None:
    """Raise where a file is one of several parts; a file that cannot be read is left to the reader's own message."""
    try:
        parts = read_gguf(path).get("split.count", 0)
    except ForgeError:
        return
    if isinstance(parts, int) and parts > 1:
        raise ForgeError(
            f"{path} is one of the {parts} parts of a GGUF file",
            f"join all {parts} with llama.cpp's tool, then give the whole file: "
            "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
        )


def _check_room(path: Path, folder: Path) -> None:
    """Raise where the disk or the memory cannot hold the file's tensors in bf16, by the file's own table.

    Two bytes a value go to the disk. In memory the largest tensor is held in float32 besides, beside its bf16 copy.
    """
    try:
        counts = [math.prod(tensor.shape) for tensor in read_gguf(path).tensors]
    except ForgeError:  # the reader names the damage with its remedy
        return
    needed, free = 2 * sum(counts) + _COMPANION_BYTES, free_space(folder.parent)
    if needed > free:
        raise ForgeError(
            f"dequantising {path.name} needs about {human_size(needed)} in {folder.parent}, "
            f"{human_size(free)} are free",
            "free disk space, or set OLLAMA_FORGE_CACHE to a folder on another disk",
        )
    memory, available = 2 * sum(counts) + 6 * max(counts, default=0), available_memory()
    if memory > available:
        raise ForgeError(
            f"dequantising {path.name} takes about {human_size(memory)} of memory, {human_size(available)} are free",
            "end other programs, take a smaller model, or take its Hugging Face release, which is edited from disk",
        )


def dequantise(path: Path, folder: Path) -> None:
    """Write ``path``, through transformers, as a bf16 checkpoint in ``folder``.

    Raises:
        ForgeError: the file is damaged or of an architecture that transformers does not read, or there is no room.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ollama_forge.quiet import quiet_transformers

    _check_room(path, folder)
    with status(f"dequantising {path.name} (once)"), quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            model, loading = loaded
            if loading["missing_keys"]:
                raise ValueError(f"it lacks {sorted(loading['missing_keys'])[0]}")
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if read_gguf(path).get("tokenizer.ggml.pre") in _DIGITS_APART:
                set_digits_apart(tokenizer)
        except Exception as error:  # readers of damaged files raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ForgeError(
                f"{path} cannot be read: {reason}",
                "is it whole, and of an architecture that transformers reads?",
            ) from error
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_in_one_piece(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def set_digits_apart(tokenizer: Any) -> None:
    """Make a byte-level tokenizer cut out every digit before it looks for words."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )

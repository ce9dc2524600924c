"""A ``.gguf`` file as source: dequantise it once into a cached bf16 checkpoint, which all other code reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.files import atomic_folder, human_size, sha256_file
from ollama_forge.progress import status
from ollama_forge.system import available_memory, free_space

_MAGIC = b"GGUF"
_COMPANION_BYTES = 20_000_000  # config and tokenizer, at most
# pre-tokenizers that split numbers into digits; transformers does not convert this rule
_SPLITS_DIGITS = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
)


def gguf_checkpoint(path: Path, label: str) -> Checkpoint:
    """Dequantise a GGUF file; the cache is keyed by the file's SHA-256.

    Raises:
        ForgeError: the file is not GGUF, truncated, one part of a split file or of an unknown architecture; or the disk
            or the memory is too small.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ForgeError(f"{path} is not a GGUF file", "give a model folder, a .gguf file or a Hub id")
    _refuse_split_file(path)
    digest = sha256_file(path)
    folder = cache_folder("gguf", digest[:24])
    if not (folder / "config.json").is_file():
        dequantise(path, folder)
    return Checkpoint(folder, label, "gguf", digest)


def _refuse_split_file(path: Path) -> None:
    """Raise ForgeError for one part of a split file."""
    try:
        parts = read_gguf(path).get("split.count", 0)
    except ForgeError:  # dequantise raises it with the reason that transformers gives
        return
    if isinstance(parts, int) and parts > 1:
        raise ForgeError(
            f"{path} is one of the {parts} parts of a split GGUF file",
            f"join all {parts} parts with llama.cpp's tool, then give the joined file: "
            "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
        )


def _check_room(path: Path, folder: Path) -> None:
    """Raise ForgeError if the disk or the memory cannot hold the file's tensors in bf16.

    The disk needs two bytes per value. The memory needs six more for each value of the largest tensor, which exists in
    float32 and as a second bf16 copy while it is converted.
    """
    try:
        counts = [math.prod(tensor.shape) for tensor in read_gguf(path).tensors]
    except ForgeError:  # dequantise raises it with the reason that transformers gives
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
    """Convert a GGUF file to a bf16 checkpoint in ``folder``, with transformers.

    Raises:
        ForgeError: the file is damaged, transformers does not read its architecture, or the disk or the memory is too
            small.
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
                raise ValueError(f"the file lacks {sorted(loading['missing_keys'])[0]}")
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if read_gguf(path).get("tokenizer.ggml.pre") in _SPLITS_DIGITS:
                split_digits(tokenizer)
        except Exception as error:  # transformers raises any exception for a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ForgeError(
                f"{path} cannot be read: {reason}",
                "if transformers reads GGUF files of this architecture, the file is damaged: download it again",
            ) from error
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def split_digits(tokenizer: Any) -> None:
    """Make a byte-level tokenizer split numbers into digits before it splits the text into words."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )

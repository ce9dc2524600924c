"""A ``.gguf`` file as source: dequantised once into a cached bf16 checkpoint that everything else works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf_io import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.files import folder_in_one_piece, human_size, sha256_file
from ollama_forge.progress import status
from ollama_forge.system import cache_root, free_space

_MAGIC = b"GGUF"
_FORM = 2  # of what is cached: a new number leaves what older versions made alone
# pre-tokenizers that set every digit apart, which transformers doesn't take over
_DIGITS_APART = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
)


def unpacked(path: Path, label: str) -> Checkpoint:
    """The checkpoint of a GGUF file; the cache is keyed by the file's content.

    Raises:
        ForgeError: not a GGUF file, cut short, of an unknown architecture, or no room.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ForgeError(f"{path} is not a GGUF file", "give a model folder, a .gguf file or a Hub id")
    digest = sha256_file(path)
    folder = cache_folder("gguf", digest[:24])
    if not (folder / "config.json").is_file():
        dequantise(path, folder)
    return Checkpoint(folder, label, "gguf", digest)


def cache_folder(kind: str, name: str) -> Path:
    """Where an unpacked checkpoint is kept."""
    return cache_root() / kind / f"{name}-{_FORM}"


def dequantise(path: Path, folder: Path) -> None:
    """Write ``path``, through transformers, as a bf16 checkpoint in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ollama_forge.quiet import quiet_transformers

    needed = 5 * path.stat().st_size  # a 4-bit file grows about fourfold
    if free_space(folder.parent) < needed:
        raise ForgeError(
            f"dequantising {path.name} needs about {human_size(needed)} in {folder.parent}",
            "set OLLAMA_FORGE_CACHE",
        )
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

"""Which files of a folder or repository hold a model's weights, chosen in the order in which transformers chooses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.errors import ForgeError

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
_ENTRIES = (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME)
_OTHER_FORMATS = {
    "consolidated*.safetensors": "in Mistral's own layout",
    "consolidated*.pth": "in Meta's own layout",
    "diffusion_pytorch_model*": "of a diffusion model",
    "*.safetensors": "under names that transformers does not look for",
    "*.h5": "for TensorFlow",
    "*.msgpack": "for Flax",
    "*.onnx": "for ONNX",
    "*.pt": "in PyTorch files that transformers does not look for",
    "*.pth": "in PyTorch files that transformers does not look for",
    "*.bin": "in PyTorch files that transformers does not look for",
}
_NOT_WEIGHTS = ("adapter_model.*", "training_args.bin", "optimizer*", "scheduler*", "*imatrix*")
_FETCH_HINT = "download one of them and give the file as --model"
_FILE_HINT = "give one of these files as --model"


def weights_entry(names: Collection[str], label: str, *, on_hub: bool = False) -> str:
    """Choose the file from which all weights are found: the one file that holds them, or the index of their shards.

    Args:
        names: files in the top folder.
        label: what messages call the model.
        on_hub: the files lie on the Hub, so that a GGUF file has to be downloaded first.

    Raises:
        ForgeError: no file holds weights that can be read here; the message says what the folder holds instead.
    """
    for entry in _ENTRIES:
        if entry in names:
            return entry
    raise unusable(names, label, on_hub=on_hub)


def unusable(names: Collection[str], label: str, *, on_hub: bool = False) -> ForgeError:
    """The failure for a folder or repository without config.json, or without weights that can be read here."""
    gguf = _matching(names, "*.gguf")
    if gguf:
        return ForgeError(f"{label} holds GGUF files only: {_listed(gguf)}", _FETCH_HINT if on_hub else _FILE_HINT)
    if "adapter_config.json" in names:
        return ForgeError(
            f"{label} is an adapter (LoRA or the like), not a model",
            "merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
        )
    weights = [name for name in names if not any(fnmatchcase(name, other) for other in _NOT_WEIGHTS)]
    for pattern, layout in _OTHER_FORMATS.items():
        found = _matching(weights, pattern)
        if found:
            return ForgeError(
                f"{label} has no {SINGLE_NAME}; it holds weights {layout}: {_listed(found)}",
                "take the model's Hugging Face release with safetensors files",
            )
    return ForgeError(f"{label} holds no {SINGLE_NAME} and no other weights", "is it a model folder?")


def _matching(names: Collection[str], pattern: str) -> list[str]:
    return sorted(name for name in names if fnmatchcase(name, pattern))


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

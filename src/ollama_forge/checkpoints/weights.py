"""Choose the weight files of a folder or repository, in the same order of preference as transformers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.errors import ForgeError

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
_ENTRIES = (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME)
_OTHER_FORMATS = {
    "consolidated*.safetensors": "in Mistral's format",
    "consolidated*.pth": "in Meta's format",
    "diffusion_pytorch_model*": "of a diffusion model",
    "*.safetensors": "under file names that transformers does not read",
    "*.h5": "for TensorFlow",
    "*.msgpack": "for Flax",
    "*.onnx": "for ONNX",
    "*.pt": "in PyTorch files that transformers does not read",
    "*.pth": "in PyTorch files that transformers does not read",
    "*.bin": "in PyTorch files that transformers does not read",
}
_NOT_WEIGHTS = ("adapter_model.*", "training_args.bin", "optimizer*", "scheduler*", "*imatrix*")
_FILE_HINT = "give one of these files as --model"


def weights_entry(names: Collection[str], label: str, *, on_hub: bool = False) -> str:
    """The name of the single weight file or of the shard index.

    Args:
        names: the files in the top folder.
        label: the model's name for messages.
        on_hub: whether the files are on the Hub, so that the hint says how to name one there.

    Raises:
        ForgeError: no file holds weights in a supported format; the message names the formats found.
    """
    for entry in _ENTRIES:
        if entry in names:
            return entry
    raise no_weights_error(names, label, on_hub=on_hub)


def no_weights_error(names: Collection[str], label: str, *, on_hub: bool = False) -> ForgeError:
    """The error for a folder or repository without config.json or without weights in a supported format."""
    gguf = _matching(names, "*.gguf")
    if gguf:
        hint = f"name one of them: --model {label}:{gguf[0]}" if on_hub else _FILE_HINT
        return ForgeError(f"{label} holds only GGUF files: {_join_names(gguf)}", hint)
    if "adapter_config.json" in names:
        return ForgeError(
            f"{label} is a PEFT adapter, not a model",
            f"give its base model as --model, and --adapter {label}",
        )
    weights = [name for name in names if not any(fnmatchcase(name, other) for other in _NOT_WEIGHTS)]
    for pattern, layout in _OTHER_FORMATS.items():
        found = _matching(weights, pattern)
        if found:
            return ForgeError(
                f"{label} has no {SINGLE_NAME}; it holds weights {layout}: {_join_names(found)}",
                "use the model's Hugging Face release with safetensors files",
            )
    return ForgeError(
        f"{label} holds no {SINGLE_NAME} and no other weights", "give a Hugging Face model folder or a Hub id"
    )


def _matching(names: Collection[str], pattern: str) -> list[str]:
    return sorted(name for name in names if fnmatchcase(name, pattern))


def _join_names(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

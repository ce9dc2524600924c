"""Check a GGUF file before it is uploaded to Ollama, and read its type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.gguf.file import SPLIT_COUNT, Gguf, read_part
from ollama_forge.errors import ForgeError

_UNQUANTISED = (0, 1, 32)  # F32, F16, BF16
_NOT_MODELS = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector for images or sound",
    "imatrix": "an importance matrix",
}


@dataclass(frozen=True)
class GgufHeader:
    """The facts about a complete GGUF file that registering it needs.

    Attributes:
        file_type: ``general.file_type``, llama.cpp's number of the type of most tensors; None if the file lacks it.
    """

    file_type: int | None

    @property
    def unquantised(self) -> bool:
        """Whether the file is F32, F16 or BF16, which Ollama can quantise."""
        return self.file_type in _UNQUANTISED

    @property
    def type_name(self) -> str:
        from gguf import LlamaFileType

        if self.file_type is None:
            return "of an unnamed type"
        try:
            return LlamaFileType(self.file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return "of an unknown type"


def read_header(path: Path) -> GgufHeader:
    """Check that ``path`` is a complete GGUF model, without reading its tensors.

    Raises:
        ForgeError: the file is missing, not GGUF, truncated, one part of a split file, or holds no model.
    """
    file = read_part(path)
    parts = file.get(SPLIT_COUNT, 0)
    if parts not in (0, 1):
        raise ForgeError(
            f"{path} is one of the {parts} parts of a split GGUF file", "join them: llama-gguf-split --merge"
        )
    require_model(file)
    file_type = file.get("general.file_type")
    return GgufHeader(file_type if isinstance(file_type, int) else None)


def require_model(file: Gguf) -> None:
    """Raise ForgeError for a file that holds an adapter, a projector, an importance matrix or no tensors."""
    kind = file.get("general.type", "model")
    other = _NOT_MODELS.get(str(kind)) or (_NOT_MODELS["mmproj"] if file.architecture == "clip" else None)
    if other is not None:
        raise ForgeError(f"{file.path} is {other}, not a model", "give the .gguf file of the model")
    if not file.tensors:
        raise ForgeError(f"{file.path} holds no tensors", "give the .gguf file of a model")

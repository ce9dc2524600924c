"""Check a GGUF file before it is uploaded to Ollama, and read its type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.gguf.file import SPLIT_COUNT, read_part
from ollama_forge.errors import ForgeError

_UNQUANTISED = {0: "F32", 1: "F16", 32: "BF16"}


@dataclass(frozen=True)
class GgufHeader:
    """The facts about a complete GGUF file that registering it needs.

    Attributes:
        file_type: ``general.file_type``, llama.cpp's number of the type of most tensors; None if the file lacks it.
        has_chat_template: whether the file has ``tokenizer.chat_template``.
    """

    file_type: int | None
    has_chat_template: bool

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
        ForgeError: the file is missing, not GGUF, truncated, one part of a split file, or an adapter.
    """
    file = read_part(path)
    parts = file.get(SPLIT_COUNT, 0)
    if parts not in (0, 1):
        raise ForgeError(
            f"{path} is one of the {parts} parts of a split GGUF file", "join them: llama-gguf-split --merge"
        )
    if file.get("general.type") == "adapter":
        raise ForgeError(f"{path} is a LoRA adapter, not a model", "give the .gguf file of the model")
    file_type = file.get("general.file_type")
    return GgufHeader(file_type if isinstance(file_type, int) else None, bool(file.get("tokenizer.chat_template")))

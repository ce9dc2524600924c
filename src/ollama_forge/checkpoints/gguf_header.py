"""A look at a GGUF file before it is uploaded: is it one, is it whole, of what type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.gguf_io import read_gguf
from ollama_forge.errors import ForgeError

_UNQUANTISED = {0: "F32", 1: "F16", 32: "BF16"}


@dataclass(frozen=True)
class GgufHeader:
    """Of a file that is whole.

    Attributes:
        file_type: llama.cpp's number of the type most tensors have; None where the file doesn't say.
        has_chat_template: whether it brings one.
    """

    file_type: int | None
    has_chat_template: bool

    @property
    def unquantised(self) -> bool:
        """Whether Ollama quantises it."""
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
    """Check that ``path`` is a model that Ollama can be given, without reading its tensors.

    Raises:
        ForgeError: no file, not GGUF, cut short, one of several parts, or an adapter.
    """
    file = read_gguf(path)
    parts = file.get("split.count", 0)
    if parts not in (0, 1):
        raise ForgeError(f"{path} is one of {parts} parts", "join them: llama-gguf-split --merge")
    if file.get("general.type") == "adapter":
        raise ForgeError(f"{path} is a LoRA adapter, not a model", "give the model's own .gguf")
    kind = file.get("general.file_type")
    return GgufHeader(kind if isinstance(kind, int) else None, bool(file.get("tokenizer.chat_template")))

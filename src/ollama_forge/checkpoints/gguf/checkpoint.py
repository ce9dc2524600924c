"""A GGUF file as a checkpoint: its tensors under their Hugging Face names, decoded where they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout
from ollama_forge.checkpoints.gguf.tensors import GgufTensors


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint. ``folder`` holds config.json and the tokenizer's files, but no weights.

    ``revision`` is the SHA-256 of the file.

    Attributes:
        file: the file's metadata and tensor table.
        layout: where the elements of the Hugging Face tensors are.
    """

    file: Gguf = field(kw_only=True)
    layout: GgufLayout = field(kw_only=True)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def location(self) -> Path:
        return self.file.path

    @cached_property
    def tensors(self) -> GgufTensors:
        return GgufTensors(self.folder, self.file, self.layout)

    @cached_property
    def fingerprint(self) -> str:
        assert self.revision is not None
        return self.revision

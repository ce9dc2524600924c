"""The tensors of a GGUF file under the names, shapes and index order of a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout
from ollama_forge.checkpoints.tensors import CheckpointTensors


class GgufTensors(CheckpointTensors):
    """The tensors of a GGUF file as those of a Hugging Face checkpoint.

    Matrices are packed tensors, whatever their type, with the file's byte rows as parts; vectors are F32 tensors.
    """

    def __init__(self, folder: Path, file: Gguf, layout: GgufLayout) -> None:
        self.folder, self.file, self.layout = folder, file, layout
        raise NotImplementedError

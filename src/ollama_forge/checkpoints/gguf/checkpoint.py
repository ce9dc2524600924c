"""A GGUF file as a checkpoint: its tensors under their Hugging Face names, decoded where they are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.digest import files_sha256
from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout
from ollama_forge.checkpoints.gguf.tensors import GgufTensors
from ollama_forge.checkpoints.quantised import Quantisation, quantisation_of


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint. ``folder`` holds config.json and the tokenizer's files, but no weights.

    ``revision`` is the SHA-256 of the file, or None if it was not computed yet.

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

    @property
    def public_name(self) -> str:
        return self.path.name if self.kind == "gguf" else super().public_name

    @cached_property
    def tensors(self) -> GgufTensors:
        return GgufTensors(self.folder, self.file, self.layout)

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """None: whatever their types, all tensors can be read."""
        return None

    @property
    def has_stray_quantization_config(self) -> bool:
        """Whether config.json names a quantisation, as that of the model that the file was made from may."""
        return quantisation_of(self._stored_config) is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return files_sha256(self.file.parts) if self.revision is None else self.revision

    def with_file(self, path: Path, sha256: str | None = None) -> GgufCheckpoint:
        """The checkpoint of another file with the same tensors and the same architecture, such as an edited one.

        Args:
            sha256: hash of the file; if None, it is computed when it is needed.

        Raises:
            ForgeError: the file is damaged.
        """
        return replace(self, file=read_gguf(path), label=str(path), kind="gguf", revision=sha256)

    def further_copies(self, names: Collection[str]) -> GgufCheckpoint | None:
        """The same file, as a checkpoint of the copies that it holds beside those of ``tensors``.

        A file may hold the embedding a second time, as its unembedding.

        Args:
            names: the tensors to look for; None is returned if there is no further copy of any of them.
        """
        used = {holder for name in self.tensors for holder in self.tensors.holders(name)}
        parts = {name: parts for name, parts in self.layout.parts.items() if name not in used}
        rest = replace(self, layout=replace(self.layout, parts=parts))
        return rest if rest.tensors.keys() & set(names) else None

"""A GGUF file with changed metadata, as bytes that are made while they are read; its tensors stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.checkpoints.gguf.file import Value, header_bytes, read_part

_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileBytes:
    """A file, or ``head`` followed by the bytes of a file from ``start`` on."""

    path: Path
    head: bytes = field(default=b"", repr=False)
    start: int = 0

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.head) + self.path.stat().st_size - self.start

    def blocks(self) -> Iterator[bytes]:
        """The bytes, in blocks of at most 1 MiB.

        Raises:
            OSError: the file cannot be read.
        """
        if self.head:
            yield self.head
        with self.path.open("rb") as file:
            file.seek(self.start)
            while block := file.read(_BLOCK):
                yield block


def with_metadata(path: Path, changes: Mapping[str, Value | None]) -> FileBytes:
    """The file with other metadata; the bytes of its tensors are copied.

    Args:
        path: a whole GGUF file, or one part of a split one.
        changes: values by key; None removes one.

    Raises:
        ForgeError: the file is missing, not GGUF, truncated or damaged.
    """
    file = read_part(path)
    metadata = {key: value for key, value in {**file.metadata, **changes}.items() if value is not None}
    start = min(tensor.start for tensor in file.tensors)
    placed = [(tensor, tensor.start - start) for tensor in file.tensors]
    return FileBytes(path, header_bytes(metadata, placed), start)

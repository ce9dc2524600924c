"""Where the rows of a matrix are in a GGUF file: read them, and write them back."""

from __future__ import annotations

from dataclasses import dataclass
from io import FileIO

import torch
from torch import Tensor as Values

from ollama_forge.checkpoints.gguf.file import Tensor, row_size
from ollama_forge.checkpoints.gguf.rows import Lines
from ollama_forge.checkpoints.storage import tensor_bytes
from ollama_forge.files import read_at, write_all


@dataclass(frozen=True, eq=False)
class Place:
    """The rows of a GGUF tensor that hold one part of a packed matrix.

    Attributes:
        first: the row of the tensor from which ``lines.rows`` is counted.
        lines: which rows these are, and what they hold.
    """

    tensor: Tensor
    first: int
    lines: Lines

    @property
    def row_size(self) -> int:
        """Bytes of a row."""
        return row_size(self.tensor.type, self.tensor.row_length)

    @property
    def matrix(self) -> int:
        """The index of the matrix that holds the rows in a stack of matrices; 0 if the tensor is one matrix."""
        return (self.first + self.lines.low) // self.tensor.shape[1] if len(self.tensor.shape) > 2 else 0

    @property
    def start(self) -> int:
        """Offset in the file of the first byte of the rows."""
        return self.tensor.start + (self.first + self.lines.low) * self.row_size

    @property
    def size(self) -> int:
        """Bytes from the first row to the last one in the file."""
        return self.lines.span * self.row_size

    def read(self, file: FileIO) -> Values:
        """The byte rows uint8 ``[lines, row size]``, in order of lines.

        Raises:
            EOFError: the file is truncated.
        """
        stored = torch.frombuffer(read_at(file, self.start, self.size), dtype=torch.uint8).view(-1, self.row_size)
        return stored if self.lines.in_order else stored[torch.from_numpy(self.lines.rows - self.lines.low)]

    def write(self, file: FileIO, rows: Values) -> None:
        """Write byte rows, in order of lines, to an unbuffered file of the same layout that is open for both."""
        if not self.lines.in_order:
            fills = self.lines.span == len(rows)
            stored = torch.empty_like(rows) if fills else self._between(file)
            stored[torch.from_numpy(self.lines.rows - self.lines.low)] = rows
            rows = stored
        file.seek(self.start)
        write_all(file, tensor_bytes(rows))

    def _between(self, file: FileIO) -> Values:
        """All rows from the first to the last one as the file has them now."""
        return torch.frombuffer(read_at(file, self.start, self.size), dtype=torch.uint8).view(-1, self.row_size)

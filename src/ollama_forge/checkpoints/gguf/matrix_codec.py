"""The codec of a Hugging Face matrix that lies in one or more tensors of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix
from ollama_forge.checkpoints.gguf.codec import decode_rows
from ollama_forge.checkpoints.gguf.rows import Lines

_ROWS = 0
Indices = slice | Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """Lines of a matrix that are rows of one GGUF tensor, whose type and row length these are."""

    type: GGMLQuantizationType
    length: int
    lines: Lines


@dataclass(frozen=True, eq=False)
class GgufMatrixCodec:
    """Parts are the byte rows uint8 ``[lines, row size]`` of each GGUF tensor that holds the matrix, in order of lines.

    Attributes:
        axis: 0 if GGUF rows are rows of the matrix, 1 if they are columns.
        members: what each part holds.
    """

    axis: int
    members: tuple[Member, ...]
    by_regions = True

    @property
    def label(self) -> str:
        return " and ".join(dict.fromkeys(member.type.name for member in self.members))

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        lines, across = (rows, columns) if self.axis == _ROWS else (columns, rows)
        found = self._decode_lines(matrix, lines, across)
        return found if self.axis == _ROWS else found.T

    def _decode_lines(self, matrix: PackedMatrix, lines: slice, across: slice) -> Tensor:
        size = (lines.stop - lines.start, across.stop - across.start)
        whole = (slice(0, size[0]), slice(0, size[1]))
        out: Tensor | None = None
        for part, member in zip(matrix.parts, self.members, strict=True):
            chosen, at_lines = _chosen_lines(member.lines, lines)
            values, at_across = _decode_across(part[chosen], member, across)
            if (at_lines, at_across) == whole:
                return values  # this part holds the whole region
            out = torch.empty(size) if out is None else out
            if isinstance(at_lines, slice):
                out[at_lines, at_across] = values
            else:
                out[at_lines.unsqueeze(1), _as_indices(at_across)] = values
        assert out is not None
        return out


def _chosen_lines(held: Lines, wanted: slice) -> tuple[slice, Indices]:
    """The rows of a part that hold some lines, and where these lines are among the wanted ones."""
    start, stop = (int(at) for at in np.searchsorted(held.lines, (wanted.start, wanted.stop)))
    return slice(start, stop), _as_slice(held.lines[start:stop] - wanted.start)


def _decode_across(rows: Tensor, member: Member, wanted: slice) -> tuple[Tensor, Indices]:
    """Decode the wanted part of byte rows, and say where the values are along the wanted part of a line."""
    across = member.lines.across
    if across is not None:
        values = decode_rows(rows, member.type)
        here = np.flatnonzero((across >= wanted.start) & (across < wanted.stop))
        at = _as_slice(across[here] - wanted.start)
        return (values if len(here) == member.length else values[:, torch.from_numpy(here)]), at
    return decode_rows(rows, member.type, wanted), slice(0, wanted.stop - wanted.start)


def _as_slice(indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Indices:
    """Indices as a slice if they follow one another."""
    if len(indices) == 0:
        return slice(0, 0)
    if bool((np.diff(indices) == 1).all()):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return torch.from_numpy(indices)


def _as_indices(indices: Indices) -> Tensor:
    return torch.arange(indices.start, indices.stop) if isinstance(indices, slice) else indices

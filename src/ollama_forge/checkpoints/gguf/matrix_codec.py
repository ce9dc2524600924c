"""The codec of a Hugging Face matrix that lies in one or more tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix, Region
from ollama_forge.checkpoints.formats.rounding import Kept
from ollama_forge.checkpoints.gguf.block_types import BLOCK_TYPES
from ollama_forge.checkpoints.gguf.codec import PLAIN_TYPES, decode_rows, spacing
from ollama_forge.checkpoints.gguf.file import row_size
from ollama_forge.checkpoints.gguf.keeping import encode_keeping
from ollama_forge.checkpoints.gguf.rows import Lines
from ollama_forge.checkpoints.gguf.types import block_size

_ROWS = 0
Indices = slice | Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """The lines of a matrix that are rows of one GGUF tensor, and the type and the row length of that tensor.

    Attributes:
        importance: the weight of the squared error of each value of a row, for encoding; None for equal weights.
    """

    type: GGMLQuantizationType
    length: int
    lines: Lines
    importance: Tensor | None = None


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

    @property
    def steps(self) -> tuple[int, int]:
        """The smallest region, ``(rows, columns)``: whole blocks of a line, all of it if its values are reordered."""
        ordered = all(member.lines.across is None for member in self.members)
        sizes = (block_size(member.type)[0] if ordered else member.length for member in self.members)
        across = max(sizes) if ordered else sum(sizes)
        return (1, across) if self.axis == _ROWS else (across, 1)

    @property
    def rounds_values(self) -> bool:
        return all(member.type in PLAIN_TYPES or member.type in BLOCK_TYPES for member in self.members)

    @property
    def rows_apart(self) -> bool:
        return self.axis == _ROWS and len(self.members) == 1

    def part(self, rows: slice) -> GgufMatrixCodec:
        """The codec of some rows of the matrix, which are rows in the file."""
        (member,) = self.members
        return GgufMatrixCodec(self.axis, (replace(member, lines=member.lines.part(rows)),))

    def blank(self, source: PackedMatrix, regions: Iterable[Region]) -> PackedMatrix:
        """A matrix that holds the source's bytes, so that blocks whose values did not change keep theirs.

        If the source is of another type, it holds zeros.
        """
        parts = []
        for member, part in zip(self.members, source.parts, strict=True):
            size = row_size(member.type, member.length)
            same = isinstance(source.codec, GgufMatrixCodec) and source.codec.label == self.label
            parts.append(part.clone() if same else torch.zeros(len(part), size, dtype=torch.uint8))
        return PackedMatrix(source.shape, self, tuple(parts))

    def encode(self, result: PackedMatrix, region: Region, kept: Kept | None) -> Tensor:
        lines, across, values = self._by_lines(region)
        turned = kept if kept is None or self.axis == _ROWS else kept.turned()
        written = torch.empty(values.shape)
        for part, member in zip(result.parts, self.members, strict=True):
            chosen, at_lines = _chosen_lines(member.lines, lines)
            at_across, stored = _stored_across(member, across)
            rows = part[chosen, stored]
            place = _indices(at_lines, at_across)
            weights = member.importance if member.importance is None else member.importance[_of_row(member, across)]
            own = (
                None if turned is None else Kept(turned.basis[at_lines if turned.axis == 0 else at_across], turned.axis)
            )
            encoded = encode_keeping(values[place], member.type, own, weights, rows)
            part[chosen, stored] = encoded.data
            written[place] = encoded.written
        return written if self.axis == _ROWS else written.T

    def spacing(self, matrix: PackedMatrix, region: Region) -> Tensor:
        lines, across, values = self._by_lines(region)
        found = torch.empty(values.shape)
        for part, member in zip(matrix.parts, self.members, strict=True):
            chosen, at_lines = _chosen_lines(member.lines, lines)
            at_across, stored = _stored_across(member, across)
            place = _indices(at_lines, at_across)
            found[place] = spacing(part[chosen, stored], member.type, values[place])
        return found if self.axis == _ROWS else found.T

    def _by_lines(self, region: Region) -> tuple[slice, slice, Tensor]:
        """A region as lines, their parts, and the values ``[lines, parts]``."""
        if self.axis == _ROWS:
            return region.rows, region.columns, region.values
        return region.columns, region.rows, region.values.T


def _stored_across(member: Member, wanted: slice) -> tuple[Indices, slice]:
    """The wanted values of a line that a row holds, in the row's order, and the bytes that hold them."""
    if member.lines.across is not None:  # the wanted values are all of the line
        return _as_slice(member.lines.across), slice(None)
    block, size = block_size(member.type)
    return slice(0, wanted.stop - wanted.start), slice(wanted.start // block * size, -(-wanted.stop // block) * size)


def _of_row(member: Member, wanted: slice) -> slice:
    """The values of a row that are wanted."""
    return wanted if member.lines.across is None else slice(None)


def _indices(lines: Indices, across: Indices) -> tuple[Indices, Indices]:
    """An index of the values of some lines at some places."""
    if isinstance(lines, slice) or isinstance(across, slice):
        return lines, across
    return lines.unsqueeze(1), across


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

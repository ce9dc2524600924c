"""What a storage format is: it finds the tensors that are stored in its form, and its codec decodes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.rounding import Kept

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""torch's type for each safetensors dtype."""
WHOLE = slice(None)


class StoredTensor(Protocol):
    """The header entry of a tensor in a safetensors file."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class StoredTensors(Protocol):
    """The tensors of a checkpoint: header entries by name, and their bytes."""

    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> StoredTensor: ...
    def __iter__(self) -> Iterator[str]: ...
    def read_bytes(self, name: str) -> bytearray: ...


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of the model that is stored in a packed form, as several tensors.

    Attributes:
        name: its name after decoding.
        shape: its shape after decoding: ``[rows, columns]``, or ``[experts, rows, columns]``.
        codec: decodes one matrix.
        parts: names of the stored tensors that hold its values, the largest first; with an expert axis for a stack.
        extras: names of stored tensors that have no use after decoding, such as the scales of activations.
    """

    name: str
    shape: tuple[int, ...]
    codec: Codec
    parts: tuple[str, ...]
    extras: tuple[str, ...] = ()

    @property
    def is_stack(self) -> bool:
        return len(self.shape) == 3

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_writable(self) -> bool:
        """Whether edited values can be stored in this form again."""
        return isinstance(self.codec, WritableCodec)


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix in its packed form, in memory: the parts of a ``PackedTensor``, or of one expert of it."""

    shape: tuple[int, int]
    codec: Codec
    parts: tuple[Tensor, ...]

    def decode(self, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Some rows and columns as float32. Codes that stand for no number become NaN."""
        return self.codec.decode(self, slice(*rows.indices(self.shape[0])), slice(*columns.indices(self.shape[1])))


class Codec(Protocol):
    """Decodes matrices that are stored in one form.

    Attributes:
        label: the form's name in messages, such as ``MXFP4``.
        by_regions: whether some rows or columns are decoded for less than the price of the whole matrix.
    """

    @property
    def label(self) -> str: ...
    @property
    def by_regions(self) -> bool: ...

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor: ...


@dataclass(frozen=True)
class Region:
    """Values of some rows and columns of a matrix, float32, in the layout on disk."""

    rows: slice
    columns: slice
    values: Tensor


@runtime_checkable
class WritableCodec(Codec, Protocol):
    """Also encodes matrices.

    Attributes:
        steps: a region that is encoded on its own starts and ends at multiples of these numbers of rows and columns, or
            at the matrix's edge; values in between share their bytes.
        rounds_values: whether each value is rounded to a number near it; else one code stands for several values.
    """

    @property
    def steps(self) -> tuple[int, int]: ...
    @property
    def rounds_values(self) -> bool: ...

    def blank(self, source: PackedMatrix, regions: Iterable[Region]) -> PackedMatrix:
        """A matrix for new values of ``source``, to be filled by ``encode``.

        Args:
            regions: all new values. A form whose scales reach over several regions fits them to these values, and keeps
                the source's own wherever the new values are within their range.
        """

    def encode(self, result: PackedMatrix, region: Region, kept: Kept | None) -> Tensor:
        """Write a region into ``result``, which ``blank`` made.

        Args:
            kept: products of the region's values that rounding should not change.

        Returns:
            The written values, decoded.
        """

    def spacing(self, matrix: PackedMatrix, region: Region) -> Tensor:
        """The distance between the two numbers of the matrix's scale that are nearest to each value of the region."""


@runtime_checkable
class RowwiseCodec(WritableCodec, Protocol):
    """Also treats some rows of a matrix as a matrix of their own.

    Attributes:
        rows_apart: whether no two rows of this matrix share bytes.
    """

    @property
    def rows_apart(self) -> bool: ...

    def part(self, rows: slice) -> WritableCodec:
        """The form of some rows, which ``CheckpointTensors.read_packed_rows`` reads."""


class Format(Protocol):
    """Finds the tensors of a checkpoint that are stored in one form."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` names a form that this format reads."""

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        """The tensors in this form.

        Args:
            entry: the ``quantization_config``; empty if the config has none.
        """


def as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View a stored tensor's bytes as a tensor of its own type, which shares their memory."""
    kind = TORCH_TYPES[dtype]
    return torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def weight_schemes(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How the weights of each of compressed-tensors' ``config_groups`` are stored; what names no scheme is empty."""
    groups = entry.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    schemes = [group.get("weights") if isinstance(group, Mapping) else None for group in found]
    return [scheme if isinstance(scheme, Mapping) else {} for scheme in schemes]

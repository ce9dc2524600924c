"""The tensors of a GGUF file under the names, shapes and index order of a Hugging Face checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor as Values

from ollama_forge.checkpoints.formats.base import PackedMatrix, PackedTensor
from ollama_forge.checkpoints.gguf.codec import decode_rows, encode_rows
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, row_size
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part, Stored
from ollama_forge.checkpoints.gguf.matrix_codec import GgufMatrixCodec, Member
from ollama_forge.checkpoints.gguf.places import Place
from ollama_forge.checkpoints.gguf.rows import flat_indices, lines_of, row_major, rows_before
from ollama_forge.checkpoints.storage import tensor_bytes
from ollama_forge.checkpoints.tensors import CheckpointTensors, TensorInfo
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_at

_DTYPE, _ITEM = "F32", 4
Held = tuple[Tensor, Part]


class GgufTensors(CheckpointTensors):
    """The tensors of a GGUF file as those of a Hugging Face checkpoint.

    A matrix, or a stack of matrices, is a packed tensor of any type, with the file's byte rows as parts. All tensors
    are also F32 tensors, whose values are decoded where they are read; vectors, and the few tensors whose GGUF rows
    are neither rows nor columns of theirs, are only that.
    """

    def __init__(self, folder: Path, file: Gguf, layout: GgufLayout) -> None:
        self.folder, self.file, self.layout = folder, file, layout
        self.shards = [*file.parts]
        self.wrappers, self.absent = (), frozenset()
        self._held = _held_whole(file, layout)
        self._infos = {name: self._info(name, held) for name, held in self._held.items()}

    def _info(self, name: str, held: list[Held]) -> TensorInfo:
        shape = self.layout.shapes[name]
        start = held[0][0].start if _is_stored_as_read(held) else 0
        return TensorInfo(name, _DTYPE, shape, held[0][0].file, start, start + math.prod(shape) * _ITEM)

    def lies_in_file(self, name: str) -> bool:
        return _is_stored_as_read(self._held[name])

    @cached_property
    def packed(self) -> Mapping[str, PackedTensor]:
        """The matrices and stacks of matrices."""
        found = {}
        for name, info in self._infos.items():
            if len(info.shape) == 2 or (len(info.shape) == 3 and min(info.shape[1:]) > 1):
                places = self._places(name, None if len(info.shape) == 2 else 0)
                if places is not None:
                    found[name] = PackedTensor(name, info.shape, _codec(places), (name,))
        return found

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._infos.items()}

    def holders(self, name: str) -> list[str]:
        """The names of the file's tensors that hold a tensor."""
        return list(dict.fromkeys(tensor.name for tensor, _ in self._held[name]))

    def codec_of(
        self, name: str, expert: int | None = None, importance: Mapping[str, Values] | None = None
    ) -> GgufMatrixCodec:
        """The codec of a packed matrix, or of one expert's matrix of a stack.

        Args:
            importance: for tensors of the file, the importance of each value of a row, ``[matrices, row length]``.
        """
        return _codec(self.places(name, expert), importance)

    def places(self, name: str, expert: int | None = None, rows: slice | None = None) -> list[Place]:
        """Where each part of a packed matrix, or of one expert's matrix of a stack, is in the file.

        Args:
            rows: some rows of a matrix whose rows are rows in the file; None for the whole matrix.
        """
        found = self._places(name, expert)
        assert found is not None
        if rows is None:
            return found
        parts = (replace(place, lines=place.lines.part(rows)) for place in found)
        return [place for place in parts if len(place.lines.rows)]

    def _places(self, name: str, expert: int | None) -> list[Place] | None:
        """None if a GGUF tensor holds the values in another way than as rows or columns."""
        found = []
        for tensor, part in self._held[name]:
            lines = lines_of(tensor, part, expert)
            if lines is None:
                return None
            if len(lines.rows):
                found.append(Place(tensor, rows_before(tensor, part), lines))
        whole = math.prod(self._infos[name].shape[-2:]) == sum(
            len(place.lines.rows) * place.tensor.row_length for place in found
        )
        return found if whole and len({place.lines.axis for place in found}) == 1 else None

    def read_packed(self, name: str, expert: int | None = None) -> PackedMatrix:
        places = self.places(name, expert)
        rows, columns = self._infos[name].shape[-2:]
        return PackedMatrix((rows, columns), _codec(places), tuple(map(_read_place, places)))

    def read_packed_rows(self, name: str, expert: int | None, rows: slice) -> PackedMatrix:
        places = self.places(name, expert, rows)
        shape = (rows.stop - rows.start, self._infos[name].shape[-1])
        return PackedMatrix(shape, _codec(places), tuple(map(_read_place, places)))

    def read_bytes(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        """Read ``size`` bytes of a tensor's float32 values from offset ``start``; by default all."""
        info = self._infos[name]
        stop = info.size if size is None else start + size
        first, last = start // _ITEM, -(-stop // _ITEM)
        data = bytearray(tensor_bytes(self._values(name, first, last)))
        return data[start - first * _ITEM : stop - first * _ITEM]

    def _values(self, name: str, start: int, stop: int) -> Values:
        """The values ``start:stop`` of a tensor, in row-major order, as float32."""
        packed = self.packed.get(name)
        if packed is None:
            return self._unpacked(name)[start:stop]
        rows, columns = packed.shape[-2:]
        found = []
        for index in range(start // (rows * columns), -(-stop // (rows * columns))):
            offset = index * rows * columns
            low, high = max(start - offset, 0), min(stop - offset, rows * columns)
            matrix = self.read_packed(name, index if packed.is_stack else None)
            values = matrix.decode(slice(low // columns, -(-high // columns))).reshape(-1)
            found.append(values[low % columns :][: high - low])
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])

    def _unpacked(self, name: str) -> Values:
        """All values of a tensor that is not packed, row-major, as float32."""
        values = torch.empty(self._infos[name].count)
        for tensor, part in self._held[name]:
            offset, size = _byte_range(tensor, part)
            with _opened(tensor) as file:
                rows = torch.frombuffer(read_at(file, offset, size), dtype=torch.uint8)
            decoded = decode_rows(rows.view(_row_count(tensor, part), -1), tensor.type)
            values[torch.from_numpy(flat_indices(tensor, part).reshape(-1))] = _loaded(decoded.reshape(-1), part.stored)
        return values

    def encoded(self, name: str, values: Values) -> Iterator[tuple[int, memoryview]]:
        """The bytes that hold new values of a tensor that is not packed, and their offsets in the file.

        Args:
            values: float32, in the tensor's shape.
        """
        flat = values.reshape(-1)
        for tensor, part in self._held[name]:
            own = _stored(flat[torch.from_numpy(flat_indices(tensor, part))], part.stored)
            rows = encode_rows(own.reshape(_row_count(tensor, part), -1), tensor.type)
            yield _byte_range(tensor, part)[0], tensor_bytes(rows)

    def same_bytes(self, first: str, second: str) -> bool:
        if first not in self.packed or second not in self.packed:
            return super().same_bytes(first, second)
        one, other = self.packed[first], self.packed[second]
        experts = range(one.shape[0]) if one.is_stack else [None]
        return (one.shape, one.codec.label) == (other.shape, other.codec.label) and all(
            _same_parts(self.read_packed(first, expert), self.read_packed(second, expert)) for expert in experts
        )


@contextmanager
def _opened(tensor: Tensor) -> Iterator[FileIO]:
    """Open the file that holds a tensor; a file that has become too short raises a ForgeError inside the block."""
    with tensor.file.open("rb", buffering=0) as file:
        try:
            yield file
        except EOFError:
            raise ForgeError(f"{tensor.file} is truncated", "make or download it again") from None


def _read_place(place: Place) -> Values:
    with _opened(place.tensor) as file:
        return place.read(file)


def _held_whole(file: Gguf, layout: GgufLayout) -> dict[str, list[Held]]:
    """For each Hugging Face tensor that the file holds in whole, the parts of the file's tensors that hold it.

    Where the file holds a tensor twice, the first of the copies is meant.
    """
    found: dict[str, list[Held]] = {}
    for tensor in file.tensors:
        for part in layout.parts.get(tensor.name, ()):
            found.setdefault(part.tensor, []).append((tensor, part))
    whole = {}
    for name, held in found.items():
        needed, chosen, seen = math.prod(layout.shapes[name]), [], set()
        for tensor, part in held:
            if needed > 0 and (part.first, part.steps) not in seen:
                needed -= part.count * math.prod(row_major(tensor)[1:])
                chosen.append((tensor, part))
                seen.add((part.first, part.steps))
        if needed == 0:
            whole[name] = chosen
    return whole


def _codec(places: list[Place], importance: Mapping[str, Values] | None = None) -> GgufMatrixCodec:
    def weights(place: Place) -> Values | None:
        entry = (importance or {}).get(place.tensor.name)
        return None if entry is None else entry[place.matrix]

    members = (Member(p.tensor.type, p.tensor.row_length, p.lines, weights(p)) for p in places)
    return GgufMatrixCodec(places[0].lines.axis, tuple(members))


def _is_stored_as_read(held: list[Held]) -> bool:
    """Whether the float32 bytes of a tensor are those of one GGUF tensor."""
    (tensor, part), *others = held
    if others or part.stored is not Stored.SAME or tensor.type.name != _DTYPE or part.count != row_major(tensor)[0]:
        return False
    return all(own.is_plain for steps in part.steps for own in steps) and _in_same_order(part)


def _in_same_order(part: Part) -> bool:
    """Whether the axes of a Hugging Face tensor follow one another as those of the GGUF tensor do."""
    axes = [own.axis for steps in part.steps for own in steps]
    return all(len(steps) <= 1 for steps in part.steps) and axes == sorted(set(axes))


def _row_count(tensor: Tensor, part: Part) -> int:
    return 1 if len(tensor.shape) == 1 else part.count * math.prod(row_major(tensor)[1:-1])


def _byte_range(tensor: Tensor, part: Part) -> tuple[int, int]:
    """Offset in the file and size of a part."""
    if len(tensor.shape) == 1:  # of a type without blocks
        return tensor.start + row_size(tensor.type, part.start), row_size(tensor.type, part.count)
    size = row_size(tensor.type, tensor.row_length)
    return tensor.start + rows_before(tensor, part) * size, _row_count(tensor, part) * size


def _loaded(values: Values, stored: Stored) -> Values:
    """The values of a Hugging Face tensor, from those in the file."""
    if stored is Stored.PLUS_ONE:
        return values - 1
    return (-values).log() if stored is Stored.MINUS_EXP else values


def _stored(values: Values, stored: Stored) -> Values:
    """The values in the file, from those of a Hugging Face tensor."""
    if stored is Stored.PLUS_ONE:
        return values + 1
    return -values.exp() if stored is Stored.MINUS_EXP else values


def _same_parts(one: PackedMatrix, other: PackedMatrix) -> bool:
    return len(one.parts) == len(other.parts) and all(map(torch.equal, one.parts, other.parts))

"""The pieces of a real model's parameters in its checkpoint, after the pieces of the twin's parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ollama_forge.architectures.learned import Piece, StoredParameter
from ollama_forge.architectures.names.counterparts import Counterpart, numbers_of, with_numbers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedPiece:
    """A piece of a real parameter, before the checkpoint is looked at.

    Attributes:
        parameter: the real parameter.
        tensor: the stored name that ``save_pretrained`` would give it.
        twin: the twin's piece that it is like.
        twin_shape: the shape of the twin's parameter.
        fixed: the index on each axis of the parameter that the stored tensor lacks.
    """

    parameter: str
    tensor: str
    twin: Piece
    twin_shape: Shape
    fixed: Mapping[int, int]


class StoredNames:
    """Tells which stored tensors hold a parameter of a real model."""

    def __init__(self, parameters: Iterable[StoredParameter]) -> None:
        self.parameters = {stored.parameter: stored for stored in parameters}
        self._sources: dict[tuple[object, ...], list[_Source]] = {}
        families: dict[tuple[object, ...], list[tuple[tuple[int, ...], Piece]]] = {}
        for stored in self.parameters.values():
            pattern, numbers = numbers_of(stored.parameter)
            for piece in stored.pieces:
                families.setdefault((pattern, *_alike(piece)), []).append((numbers, piece))
        for key, members in families.items():
            self._sources[key] = _sources(members)

    def expected(self, counterpart: Counterpart, shape: Shape) -> list[ExpectedPiece]:
        """The pieces of a real parameter of this shape; empty if it is not saved as boxes."""
        twin = self.parameters[counterpart.twin]
        if len(shape) != len(twin.shape) or any(len(piece.memory) < len(shape) for piece in twin.pieces):
            return []
        pattern = numbers_of(twin.parameter)[0]
        real = numbers_of(counterpart.parameter)[1]
        groups: dict[tuple[object, ...], list[Piece]] = {}
        for piece in twin.pieces:
            groups.setdefault(_alike(piece), []).append(piece)
        out = []
        for key, members in groups.items():
            sources = self._sources[pattern, *key]
            for fixed, piece in _repeated(members, twin.shape, shape):
                stored, slots = numbers_of(piece.tensor)
                filled = [source.number(real, fixed, slot) for source, slot in zip(sources, slots, strict=True)]
                out.append(ExpectedPiece(counterpart.parameter, with_numbers(stored, filled), piece, twin.shape, fixed))
        return out


def _fixed(piece: Piece) -> dict[int, int]:
    """The index on each axis of the parameter that the stored tensor lacks."""
    return {axis: piece.memory[axis].start for axis, on_disk in enumerate(piece.axes) if on_disk is None}


def _alike(piece: Piece) -> tuple[object, ...]:
    """What the pieces of all experts have in common."""
    memory = tuple(None if axis is None else indices for axis, indices in zip(piece.axes, piece.memory, strict=False))
    return numbers_of(piece.tensor)[0], piece.shape, memory, piece.stored, piece.axes


def _repeated(members: list[Piece], twin_shape: Shape, shape: Shape) -> Iterator[tuple[dict[int, int], Piece]]:
    """The fixed indices of each real piece, and a twin's piece that it is like.

    On an axis where the twin's pieces have all indices, the real pieces have all of theirs.
    """
    by_index = {tuple(_fixed(piece).values()): piece for piece in members}
    axes = list(_fixed(members[0]))
    seen = [sorted({index[at] for index in by_index}) for at in range(len(axes))]
    indices = [
        range(shape[axis]) if used == list(range(twin_shape[axis])) else used
        for axis, used in zip(axes, seen, strict=True)
    ]
    for index in itertools.product(*indices):
        yield dict(zip(axes, index, strict=True)), by_index.get(index, members[0])


@dataclass(frozen=True)
class _Source:
    """Where a number in a stored name is from: a number of the parameter's name, its index on an axis, or neither."""

    name: int | None = None
    axis: int | None = None
    offset: int = 0

    def number(self, numbers: tuple[int, ...], fixed: Mapping[int, int], constant: int) -> int:
        if self.name is not None:
            return numbers[self.name] + self.offset
        return constant if self.axis is None else fixed[self.axis] + self.offset


def _sources(members: list[tuple[tuple[int, ...], Piece]]) -> list[_Source]:
    """The source of each number in the stored names of alike pieces.

    Args:
        members: for each piece, the numbers in the name of its parameter.
    """
    slots = [numbers_of(piece.tensor)[1] for _, piece in members]
    out: list[_Source] = []
    for at in range(len(slots[0])):
        values = [slot[at] for slot in slots]
        choices: list[tuple[tuple[bool, bool, bool], _Source]] = []
        for source in _possible_sources(members):
            offsets = {
                value - source.number(n, _fixed(piece), 0) for value, (n, piece) in zip(values, members, strict=True)
            }
            if len(offsets) == 1:
                offset = offsets.pop()
                used = any((source.name, source.axis) == (other.name, other.axis) for other in out)
                choices.append(
                    (
                        (len(set(values)) == 1 and (used or offset != 0), used, offset != 0),
                        replace(source, offset=offset),
                    )
                )
        if len(set(values)) == 1:
            choices.append(((False, True, True), _Source()))
        out.append(min(choices, key=lambda choice: choice[0])[1] if choices else _Source())
    return out


def _possible_sources(members: list[tuple[tuple[int, ...], Piece]]) -> list[_Source]:
    numbers, piece = members[0]
    return [_Source(name=at) for at in range(len(numbers))] + [_Source(axis=axis) for axis in _fixed(piece)]

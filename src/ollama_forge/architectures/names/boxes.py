"""Boxes of parameters and stored tensors in a real model's sizes, after the boxes of its twin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ollama_forge.architectures.names.pieces import ExpectedPiece, Shape
from ollama_forge.errors import ForgeError

MISMATCH_HINT = "config.json and the weights are of different models: download or save the model again"


@dataclass(frozen=True)
class Box:
    """A box of a real parameter, and the box of a stored tensor that holds the same values, as in ``Piece``.

    ``twin`` is the box of the twin's parameter that it is like; empty for a whole parameter.
    """

    parameter: str
    tensor: str
    memory: tuple[range, ...]
    stored: tuple[range, ...]
    axes: tuple[int | None, ...]
    twin: tuple[range, ...] = ()

    @property
    def count(self) -> int:
        return math.prod(len(indices) for indices in self.memory)


def whole(parameter: str, tensor: str, shape: Shape) -> Box:
    """The box of a tensor that is stored as the parameter is in memory."""
    full = tuple(range(size) for size in shape)
    return Box(parameter, tensor, full, full, tuple(range(len(shape))))


def boxes(
    expected: Mapping[str, list[tuple[ExpectedPiece, str]]],
    parameters: Mapping[str, Shape],
    tensors: Mapping[str, Shape],
) -> dict[str, list[Box]]:
    """The boxes of each parameter in the sizes of the checkpoint.

    A part of a parameter or tensor keeps its order among the other parts and its step; its length is that of the
    parameter or of the tensor that it fills, otherwise its share of the whole.

    Args:
        expected: for each parameter its pieces, with the names of the tensors that hold them.
        parameters: the shapes of the real parameters.
        tensors: the shapes of the stored tensors.

    Raises:
        ForgeError: the shapes of a parameter and of its tensors contradict each other.
    """
    lengths = {
        name: [(piece, tensor, _lengths(piece, tensor, parameters[name], tensors[tensor])) for piece, tensor in pieces]
        for name, pieces in expected.items()
    }
    memory: dict[tuple[str, int], dict[range, int]] = {}
    stored: dict[tuple[str, int], dict[range, int]] = {}
    for name, pieces in lengths.items():
        for piece, tensor, sizes in pieces:
            for axis, on_disk in enumerate(piece.twin.axes):
                if on_disk is not None:
                    in_memory = memory.setdefault((name, axis), {})
                    if in_memory.setdefault(piece.twin.memory[axis], sizes[axis]) != sizes[axis]:
                        raise mismatch(tensor, tensors[tensor], name, parameters[name])
                    stored.setdefault((tensor, on_disk), {})[piece.twin.stored[on_disk]] = sizes[axis]
    out: dict[str, list[Box]] = {}
    for name, pieces in lengths.items():
        out[name] = [_box(piece, tensor, memory, stored) for piece, tensor, _ in pieces]
        _check(name, out[name], parameters[name], tensors)
    return out


def _lengths(piece: ExpectedPiece, tensor: str, parameter: Shape, stored: Shape) -> list[int]:
    """The length of a piece on each axis of its parameter."""
    twin = piece.twin
    if len(stored) != len(twin.shape):
        raise mismatch(tensor, stored, piece.parameter, parameter)
    out = []
    for axis, on_disk in enumerate(twin.axes):
        if on_disk is None:
            out.append(1)
            continue
        fills_parameter = twin.memory[axis] == range(piece.twin_shape[axis])
        fills_tensor = twin.stored[on_disk] == range(twin.shape[on_disk])
        if fills_parameter and fills_tensor and parameter[axis] != stored[on_disk]:
            raise mismatch(tensor, stored, piece.parameter, parameter)
        if fills_parameter or fills_tensor:
            out.append(parameter[axis] if fills_parameter else stored[on_disk])
            continue
        share = len(twin.memory[axis]) * parameter[axis]
        if share % piece.twin_shape[axis]:
            raise mismatch(tensor, stored, piece.parameter, parameter)
        out.append(share // piece.twin_shape[axis])
    return out


def _box(
    piece: ExpectedPiece,
    tensor: str,
    memory: Mapping[tuple[str, int], Mapping[range, int]],
    stored: Mapping[tuple[str, int], Mapping[range, int]],
) -> Box:
    twin, on_disk = piece.twin, list(piece.twin.stored)
    in_memory = []
    for axis, stored_axis in enumerate(twin.axes):
        if stored_axis is None:
            in_memory.append(range(piece.fixed[axis], piece.fixed[axis] + 1))
            continue
        in_memory.append(_placed(twin.memory[axis], memory[piece.parameter, axis]))
        on_disk[stored_axis] = _placed(twin.stored[stored_axis], stored[tensor, stored_axis])
    return Box(piece.parameter, tensor, tuple(in_memory), tuple(on_disk), twin.axes, twin.memory)


def _placed(twin: range, lengths: Mapping[range, int]) -> range:
    """A part of an axis, behind the parts that are before it in the twin."""
    length = lengths[twin]
    if twin.step > 1:
        return range(twin.start, twin.start + twin.step * (length - 1) + 1, twin.step)
    start = sum(other for part, other in lengths.items() if part.stop <= twin.start)
    return range(start, start + length)


def _check(name: str, found: Iterable[Box], parameter: Shape, tensors: Mapping[str, Shape]) -> None:
    """Raise ForgeError unless the boxes hold each element of the parameter, inside their tensors."""
    total = 0
    for box in found:
        stored = tensors[box.tensor]
        inside = all(indices[-1] < size for indices, size in zip(box.memory, parameter, strict=True))
        if not inside or any(indices[-1] >= size for indices, size in zip(box.stored, stored, strict=True)):
            raise mismatch(box.tensor, stored, name, parameter)
        total += box.count
        last = box
    if total != math.prod(parameter):
        raise mismatch(last.tensor, tensors[last.tensor], name, parameter)


def mismatch(tensor: str, stored: Shape, parameter: str, shape: Shape) -> ForgeError:
    """The error for a tensor whose shape contradicts the parameter's."""
    return ForgeError(
        f"{tensor} is stored as {stored}, which does not fit {parameter} {shape} of the model of its config",
        MISMATCH_HINT,
    )

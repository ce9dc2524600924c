"""Find where a program that moves tensors puts their elements, from what it makes of made-up values.

The program is a graph of lazy tensors (``gguf.LazyBase``). Each pass gives all elements of its inputs one of their
coordinates as value: the number of their tensor, then their index along each axis. What comes out says, for each
element of an output, from where it came. The worker imports this module, so it imports no library but numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.checkpoints.gguf.layout import Integers, Part, Steps, Stored

Shape = tuple[int, ...]
Floats = NDArray[np.float32]
Coordinate = Callable[[str, Shape], Any]
"""Makes the values of an input, given its name and shape, as a torch tensor."""

UNIT = 2.0**-16  # of a coordinate: up to 2**23 of them are exact in float32, after + 1 too, and exp keeps them apart
_CONSTANTS = (0.3125, 0.71875)
_STORED: dict[Stored, Callable[[float], float]] = {
    Stored.SAME: lambda x: x,
    Stored.PLUS_ONE: lambda x: x + 1,
    Stored.MINUS_EXP: lambda x: -math.exp(x),
}
_CHUNK = 1 << 22  # elements that are compared at once
_MAX_PARTS = 4096
_TOLERANCE = 0.2  # of a coordinate that exp and log went over


class NotMovedError(Exception):
    """The program does more than move elements."""


class Program:
    """Evaluates lazy tensors, as often as wanted, with values that change from pass to pass.

    ``values`` is to be the function of the lazy tensors that are the inputs, with name and shape as arguments.
    """

    def __init__(self) -> None:
        self.coordinate: Coordinate | None = None

    def values(self, name: str, shape: Shape) -> Any:
        if self.coordinate is None:
            raise ValueError(f"the converter reads the values of {name}")
        return self.coordinate(name, shape)

    def run(self, output: Any, coordinate: Coordinate) -> Floats:
        """The values of an output. Nothing is kept in its graph, unlike what ``to_eager`` does."""
        done: dict[int, Any] = {}

        def value(node: Any) -> Any:
            if node._data is not None:
                return node._data
            if id(node) not in done:
                done[id(node)] = node._func(*_mapped(node._args, value), **node._kwargs)
            return done[id(node)]

        self.coordinate = coordinate
        try:
            return np.asarray(value(output))
        finally:
            self.coordinate = None
            done.clear()  # the function above refers to itself, so it and what it refers to would stay for a while

    def inputs(self, output: Any) -> tuple[str, dict[str, Shape]]:
        """What an output is made from.

        Returns:
            A hash of the graph, equal for outputs that are made in the same way from inputs of the same shapes; and
            the names and shapes of the inputs, in the order of the graph.
        """
        found: dict[str, Shape] = {}
        done: dict[int, str] = {}

        def key(node: Any) -> str:
            if id(node) not in done:
                if node._func == self.values:
                    name, shape = node._args
                    found.setdefault(name, tuple(shape))
                    content: list[Any] = ["input", list(found).index(name), found[name]]
                else:
                    content = [_function_key(node._func), _arguments_key(node._args, key)]
                    content += [sorted(node._kwargs.items()), _array_key(node._data)]
                done[id(node)] = hashlib.sha256(repr(content).encode()).hexdigest()
            return done[id(node)]

        return key(output), found


def _is_lazy(value: Any) -> bool:
    return hasattr(type(value), "to_eager")


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_mapped(item, function) for item in value])
    return function(value) if _is_lazy(value) else value


def _function_key(function: Any) -> Any:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return repr(function)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    inner = [_function_key(item) if callable(item) else repr(item) for item in cells]
    return [code.co_filename, code.co_firstlineno, inner]


def _arguments_key(value: Any, key: Callable[[Any], str]) -> Any:
    if isinstance(value, list | tuple):
        return [_arguments_key(item, key) for item in value]
    if _is_lazy(value):
        return key(value)
    return _array_key(value) if hasattr(value, "shape") else repr(value)


def _array_key(value: Any) -> Any:
    if value is None:
        return None
    array = np.ascontiguousarray(np.asarray(value))
    return [array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]


def parts_of(program: Program, output: Any, inputs: dict[str, Shape]) -> tuple[Part, ...]:
    """The parts that fill an output.

    Args:
        inputs: as ``Program.inputs`` returns them.

    Raises:
        NotMovedError: a value is computed, or the order of the elements follows no rule that a part can express.
    """
    stored = _stored(program, output)
    names = list(inputs)
    run = program.run
    tensor = _Coordinates(run(output, _constants({name: at * UNIT for at, name in enumerate(names)})), stored)
    changes = np.flatnonzero(np.diff(tensor.along(0))) + 1
    segments = list(pairwise([0, *changes.tolist(), len(tensor.values)]))
    for start, end in segments:
        profiles = tensor.profiles(start, end)
        if any(profile.any() for profile in profiles):
            raise NotMovedError("it holds several tensors side by side")
    owners = [names[tensor.at_row(start)] for start, _ in segments]
    del tensor
    found: list[list[list[Integers]]] = [[] for _ in segments]
    firsts: list[list[int]] = [[] for _ in segments]
    for axis in range(max(map(len, inputs.values()))):
        index = _Coordinates(run(output, _axis_index(axis)), stored)  # the largest of these arrays: one at a time
        for at, (start, end) in enumerate(segments):
            if axis < len(inputs[owners[at]]):
                found[at].append(index.profiles(start, end))
                firsts[at].append(index.at_row(start))
        del index
    parts: list[Part] = []
    for (start, end), owner, profile, first in zip(segments, owners, found, firsts, strict=True):
        whole = Part(owner, inputs[owner], start, end - start, tuple(first), ((),) * len(first), stored)
        parts += _split(whole, profile)
        if len(parts) > _MAX_PARTS:
            raise NotMovedError("its rows are in no regular order")
    return tuple(parts)


def _constants(values: dict[str, float]) -> Coordinate:
    import torch

    return lambda name, shape: torch.tensor(values[name], dtype=torch.float32).expand(shape)


def _axis_index(axis: int) -> Coordinate:
    import torch

    def values(name: str, shape: Shape) -> Any:
        if axis >= len(shape):
            return torch.zeros((), dtype=torch.float32).expand(shape)
        index = torch.arange(shape[axis], dtype=torch.float32) * UNIT
        return index.reshape(-1, *[1] * (len(shape) - axis - 1)).expand(shape)

    return values


def _stored(program: Program, output: Any) -> Stored:
    """The function that the program applies to every value, found from its results for two constants."""
    import torch

    made = []
    for constant in _CONSTANTS:
        values = program.run(output, lambda _, shape, c=constant: torch.tensor(c).expand(shape))  # type: ignore[misc]
        if values.min() != values.max():
            raise NotMovedError("its values are computed in several ways")
        made.append(float(values.flat[0]))
        del values
    for stored, function in _STORED.items():
        if np.allclose(made, [function(constant) for constant in _CONSTANTS], rtol=1e-5):
            return stored
    raise NotMovedError("its values are computed")


class _Coordinates:
    """One coordinate of each element of an output."""

    def __init__(self, values: Floats, stored: Stored) -> None:
        self.values = values.reshape(values.shape or (1,))
        self.stored = stored

    def at_row(self, row: int) -> int:
        return int(self.decode(self.values[row, ...].flat[0].reshape(1))[0])

    def along(self, axis: int, row: int = 0) -> Integers:
        """The coordinate along an axis, at the first index of the others; ``row`` is that of axis 0."""
        place: list[Any] = [row, *[0] * (self.values.ndim - 1)]
        place[axis] = slice(None)
        return self.decode(self.values[tuple(place)])

    def decode(self, values: Floats) -> Integers:
        found: NDArray[Any]
        if self.stored is Stored.MINUS_EXP:
            found = np.log(-values.astype(np.float64)) / UNIT
        else:
            found = (values - np.float32(self.stored is Stored.PLUS_ONE)) / np.float32(UNIT)
        whole = np.rint(found)
        if np.abs(found - whole).max() > _TOLERANCE:
            raise NotMovedError("its values are mixed")
        return whole.astype(np.int64)

    def profiles(self, start: int, end: int) -> list[Integers]:
        """For each axis, what the coordinate grows by from its first index, in rows ``start`` to ``end``.

        Raises:
            NotMovedError: in some element, it is not the sum over the axes.
        """
        profiles = [self.along(axis, start) for axis in range(self.values.ndim)]
        profiles = [profile - (profile[start] if axis == 0 else profile[0]) for axis, profile in enumerate(profiles)]
        profiles[0] = profiles[0][start:end]
        if not self.is_sum(self.values[start:end], self.at_row(start), profiles):
            raise NotMovedError("its elements are in no regular order")
        return profiles

    def is_sum(self, values: Floats, first: int, profiles: Sequence[Integers]) -> bool:
        """Whether every coordinate is ``first`` plus its steps along all axes; a block of elements at a time."""
        if values.size <= _CHUNK:
            total = np.full((), first, dtype=np.int64)
            for profile in profiles:
                total = total[..., None] + profile
            return np.array_equal(self.decode(values), total)
        rows, *others = profiles
        if len(values) == 1:
            return self.is_sum(values[0], first + int(rows[0]), others)
        middle = len(values) // 2
        return self.is_sum(values[:middle], first, [rows[:middle], *others]) and self.is_sum(
            values[middle:], first, [rows[middle:], *others]
        )


def _split(whole: Part, profiles: Sequence[Sequence[Integers]]) -> Iterator[Part]:
    """Split a part along axis 0 where the order of its rows changes.

    Args:
        profiles: for each axis of the tensor and each axis of the output, the steps of the index.
    """
    n_axes = len(profiles[0])
    others = []
    for axis in range(1, n_axes):
        steps = np.stack([of_axis[axis] for of_axis in profiles], axis=1)
        digits = _digits(steps)
        if math.prod(count for count, _ in digits) < len(steps):
            raise NotMovedError("its columns are in no regular order")
        others.append((axis, digits))
    rows = np.stack([of_axis[0] for of_axis in profiles], axis=1)
    low = 0
    while low < len(rows):
        digits = _digits(rows[low:])
        count = math.prod(count for count, _ in digits)
        first = tuple(int(start + step) for start, step in zip(whole.first, rows[low], strict=True))
        taken = tuple(tuple(_steps(axis, [(0, digits), *others])) for axis in range(len(profiles)))
        yield replace(whole, start=whole.start + low, count=count, first=first, steps=taken)
        low += count


Digit = tuple[int, Integers]
"""The number of values of a digit, and the step that it takes along each axis of the Hugging Face tensor."""


def _steps(axis: int, digits_of: Sequence[tuple[int, Sequence[Digit]]]) -> Iterator[Steps]:
    for on, digits in digits_of:
        strides = tuple(int(stride[axis]) for _, stride in digits)
        if any(strides):
            yield Steps(on, tuple(count for count, _ in digits), strides)


def _digits(steps: Integers) -> list[Digit]:
    """The digits, the slowest first, that the longest beginning of some steps is made of.

    Args:
        steps: int64 ``[count, axes]``.

    Raises:
        NotMovedError: an element occurs twice.
    """
    found: list[Digit] = []
    left = steps - steps[0]
    while len(left) > 1:
        stride = left[1]
        if not stride.any():
            raise NotMovedError("it holds an element twice")
        run = _true_until(np.arange(len(left))[:, None] * stride == left)
        found.append((run, stride))
        blocks = left[: len(left) // run * run].reshape(-1, run, left.shape[1])
        same = (blocks - blocks[:, :1] == blocks[0]).all(axis=1)
        left = blocks[: _true_until(same), 0]
    return found[::-1]


def _true_until(rows: NDArray[np.bool_]) -> int:
    """The number of rows before the first row that is not all true."""
    wrong = np.flatnonzero(~rows.all(axis=1))
    return int(wrong[0]) if len(wrong) else len(rows)

"""Which rows of a GGUF tensor hold which rows, or columns, of a Hugging Face matrix.

A GGUF tensor is a stack of rows, each encoded on its own in blocks. A *line* is a row of the Hugging Face matrix, or a
column if the converter transposes it: what one GGUF row holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ollama_forge.checkpoints.gguf.file import Tensor
from ollama_forge.checkpoints.gguf.layout import Integers, Part, Steps, Stored

AllSteps = tuple[tuple[Steps, ...], ...]


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines of a matrix that consecutive rows of a GGUF tensor hold.

    Attributes:
        axis: 0 if lines are rows of the matrix, 1 if they are columns.
        rows: int64 ``[n]``, the GGUF rows, relative to the first one of the part, in ascending order of their lines.
        lines: int64 ``[n]``, the index of the line that each of these rows holds, ascending.
        across: int64 ``[row length]``, the index along the line of each value of a row; None for 0, 1, 2, ...
    """

    axis: int
    rows: Integers
    lines: Integers
    across: Integers | None

    @cached_property
    def low(self) -> int:
        """The first of the rows."""
        return int(self.rows.min())

    @cached_property
    def span(self) -> int:
        """The number of rows from the first to the last one."""
        return int(self.rows.max()) + 1 - self.low

    @cached_property
    def in_order(self) -> bool:
        """Whether the rows follow one another as the lines do."""
        return bool((np.diff(self.rows) == 1).all())

    def part(self, wanted: slice) -> Lines:
        """Those of some lines of the matrix, counted from the first wanted one."""
        start, stop = (int(at) for at in np.searchsorted(self.lines, (wanted.start, wanted.stop)))
        return Lines(self.axis, self.rows[start:stop], self.lines[start:stop] - wanted.start, self.across)


def row_major(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a GGUF tensor with the rows last, as in torch."""
    return tensor.shape[::-1]


def rows_before(tensor: Tensor, part: Part) -> int:
    """The number of rows of a GGUF tensor before the first one of a part."""
    return part.start * math.prod(row_major(tensor)[1:-1])


def lines_of(tensor: Tensor, part: Part, expert: int | None) -> Lines | None:
    """The lines of a matrix, or of one expert's matrix of a stack, that a part holds.

    None if the rows of the GGUF tensor are no lines of the matrix, or not its values as they are.
    """
    if part.stored is not Stored.SAME:
        return None
    shape = row_major(tensor)
    if len(shape) == 1:  # a matrix with one row, or one column
        if part.count != shape[0]:
            return None
        shape, steps = (1, *shape), tuple(tuple(Steps(1, s.counts, s.strides) for s in own) for own in part.steps)
        return _lines(steps, part.first, part.shape, shape, 1, expert)
    return _lines(part.steps, part.first, part.shape, shape, part.count, expert)


@lru_cache(maxsize=4096)
def _lines(
    steps: AllSteps,
    first: tuple[int, ...],
    target: tuple[int, ...],
    shape: tuple[int, ...],
    count: int,
    expert: int | None,
) -> Lines | None:
    """See ``lines_of``; tensors of all layers share the result."""
    last = len(shape) - 1
    matrix = len(target) - 2  # the Hugging Face axis of the matrix's rows
    along = {axis for axis, own in enumerate(steps) if any(s.axis == last and s.size > 1 for s in own)}
    if not along and shape[last] == 1:
        along = {matrix + 1} if target[-1] == 1 else {matrix}
    if len(along) != 1 or (across_axis := along.pop()) < matrix:
        return None
    line_axis = matrix if across_axis == matrix + 1 else matrix + 1
    if any(s.axis != last and s.size > 1 for s in steps[across_axis]):
        return None
    indices = [first[axis] + _row_indices(steps[axis], (count, *shape[1:last])) for axis in range(len(target))]
    rows = np.arange(count * math.prod(shape[1:last]), dtype=np.int64)
    if expert is not None:
        rows = np.flatnonzero(indices[0] == expert)
    lines = indices[line_axis][rows]
    if (np.diff(lines) < 0).any():
        order = np.argsort(lines, kind="stable")
        rows, lines = rows[order], lines[order]
    across = first[across_axis] + sum((s.indices() for s in steps[across_axis]), np.zeros(shape[last], dtype=np.int64))
    plain = len(across) == target[across_axis] and bool((across == np.arange(len(across))).all())
    return Lines(line_axis - matrix, rows, lines, None if plain else across)


def _row_indices(steps: tuple[Steps, ...], sizes: tuple[int, ...]) -> Integers:
    """The sum of the steps for each row of a tensor whose axes but the last have these sizes, int64 ``[rows]``."""
    found = np.zeros(sizes, dtype=np.int64)
    for own in steps:
        if own.axis < len(sizes):
            found += own.indices().reshape([-1 if axis == own.axis else 1 for axis in range(len(sizes))])
    return found.reshape(-1)


def flat_indices(tensor: Tensor, part: Part) -> Integers:
    """The position of each element of a part in the Hugging Face tensor, int64 in the shape of the part."""
    sizes = (part.count, *row_major(tensor)[1:])
    found = np.zeros(sizes, dtype=np.int64)
    for axis, (first, steps) in enumerate(zip(part.first, part.steps, strict=True)):
        stride = math.prod(part.shape[axis + 1 :])
        found += first * stride
        for own in steps:
            found += own.indices().reshape([-1 if at == own.axis else 1 for at in range(len(sizes))]) * stride
    return found

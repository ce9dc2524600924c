"""Where ``save_pretrained`` puts every element of every parameter of a twin.

Every element gets its own number, the twin is saved, and the numbers are read back from the files.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ollama_forge.architectures.learned import Piece, StoredParameter
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.quiet import quiet_transformers

_FIRST = 5001  # above what constants that a class computes on saving may hold
_ROOM = 2**24 - _FIRST  # float32 holds all integers up to 2^24
_MOST_RUNS = 64  # of one axis; more are an order that no few boxes express
_LARGEST_STEP = 8

Integers = NDArray[np.int64]


def locate(twin: Twin) -> tuple[StoredParameter, ...]:
    """Find all parameters, and the float buffers that are saved, in the files that ``save_pretrained`` writes.

    Every element is looked up, not a sample. The weights are the same afterwards, bit for bit.

    Returns:
        one entry for each parameter and buffer, in the order of ``named_parameters`` and then ``named_buffers``. Its
        pieces cover all of its elements, or there are none: ``save_pretrained`` does not write it, or not as it is.
    """
    tensors = saved_tensors(twin.model)
    offsets = np.cumsum([0, *(tensor.numel() for tensor in tensors.values())])
    stored = _stored_numbers(twin.model, list(tensors.values()), offsets)
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    names = list(tensors)
    for stored_name, numbers in stored.items():
        flat = numbers.reshape(-1)
        at = np.flatnonzero(flat >= 0)
        owners = np.searchsorted(offsets, flat[at], side="right") - 1
        for owner in np.unique(owners):
            mine = at[owners == owner]
            shape = tuple(tensors[names[owner]].shape)
            pieces[names[owner]] += _pieces(flat[mine] - offsets[owner], mine, shape, stored_name, numbers.shape)
    found = np.zeros(offsets[-1], dtype=bool)
    for numbers in stored.values():
        found[numbers[numbers >= 0]] = True
    return tuple(
        StoredParameter(name, tuple(tensor.shape), tuple(pieces[name]) if found[start:end].all() else ())
        for (name, tensor), start, end in zip(tensors.items(), offsets, offsets[1:], strict=False)
    )


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model, tied ones once, and its persistent buffers; floats alone."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _stored_numbers(model: nn.Module, tensors: Sequence[Tensor], offsets: Integers) -> dict[str, Integers]:
    """For each stored tensor, the flat index of the element (over all ``tensors``) at each position; -1 for none."""
    total = int(offsets[-1])
    stored: dict[str, Integers] = {}
    with _restored(tensors):
        for start in range(0, total, _ROOM):
            for tensor, offset in zip(tensors, offsets, strict=False):
                number = torch.arange(offset - start, offset - start + tensor.numel(), dtype=torch.float64)
                in_round = (number >= 0) & (number < _ROOM)
                tensor.copy_(torch.where(in_round, number + _FIRST, 0.0).view(tensor.shape))
            last = min(_FIRST + total - start, _FIRST + _ROOM)
            for name, values in _saved(model).items():
                number = values.double()
                hit = (number >= _FIRST) & (number < last) & (number == number.round())
                found = torch.where(hit, number - _FIRST + start, -1).long().numpy()
                stored[name] = np.maximum(stored.get(name, found), found)
    return stored


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back at the end."""
    values = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        try:
            yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _saved(model: Any) -> dict[str, Tensor]:
    """The float tensors that ``save_pretrained`` writes."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
        for path in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _pieces(
    elements: Integers, positions: Integers, shape: tuple[int, ...], tensor: str, stored_shape: tuple[int, ...]
) -> list[Piece]:
    """The boxes of a parameter ``shape`` whose ``elements`` are at ``positions`` of a stored tensor (flat indices)."""
    order = np.argsort(elements, kind="stable")
    elements, positions = elements[order], positions[order]
    used = [np.unique(axis) for axis in np.unravel_index(elements, shape)] if shape else []
    nowhere = [Piece(tensor, stored_shape, (), (), ())]
    if math.prod(len(axis) for axis in used) != len(elements):
        return nowhere
    box = positions.reshape([len(axis) for axis in used])
    base = int(positions[0])
    steps = [np.moveaxis(box, axis, 0).reshape(len(box_axis), -1)[:, 0] - base for axis, box_axis in enumerate(used)]
    if (box != base + sum(np.ix_(*steps), start=np.int64(0))).any():
        return nowhere
    runs = [_runs(indices, step) for indices, step in zip(used, steps, strict=True)]
    if any(len(axis) > _MOST_RUNS for axis in runs):
        return nowhere
    found = []
    for choice in itertools.product(*runs):
        start = base + sum(run.offset for run in choice)
        piece = _piece(choice, start, shape, tensor, stored_shape)
        if piece is None:
            return nowhere
        found.append(piece)
    return found


class _Run:
    """Indices of one axis of a parameter in equal steps, whose positions on disk are in equal steps too."""

    def __init__(self, indices: Integers, offsets: Integers) -> None:
        step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
        self.indices = range(int(indices[0]), int(indices[-1]) + 1, step)
        self.offset = int(offsets[0])
        self.stride = int(offsets[1] - offsets[0]) if len(indices) > 1 else 0


def _runs(indices: Integers, offsets: Integers) -> list[_Run]:
    """Split an axis into few runs: as it is, or into every second, third, … index first (for interleaved rows)."""
    best: list[_Run] = []
    for step in range(1, min(_LARGEST_STEP, len(indices)) + 1):
        runs: list[_Run] = []
        for first in range(step):
            runs += _contiguous_runs(indices[first::step], offsets[first::step])
        if not best or len(runs) < len(best):
            best = runs
    return best


def _contiguous_runs(indices: Integers, offsets: Integers) -> list[_Run]:
    """Split where the step of the indices or of the positions changes."""
    runs, start = [], 0
    changes = np.diff(np.stack([indices, offsets]), axis=1)
    while start < len(indices):
        same = (changes[:, start:] == changes[:, start : start + 1]).all(axis=0)
        length = 1 + (int(np.argmin(same)) if len(same) and not same.all() else len(same))
        runs.append(_Run(indices[start : start + length], offsets[start : start + length]))
        start += length
    return runs


def _piece(
    runs: Sequence[_Run], start: int, shape: tuple[int, ...], tensor: str, stored_shape: tuple[int, ...]
) -> Piece | None:
    """The piece of one run on each axis; None if two axes of the parameter are one axis on disk."""
    strides = [math.prod(stored_shape[axis + 1 :]) for axis in range(len(stored_shape))]
    first = [int(index) for index in np.unravel_index(start, stored_shape)] if stored_shape else []
    stored = [range(index, index + 1) for index in first]
    axes: list[int | None] = []
    for run in runs:
        if len(run.indices) == 1:
            axes.append(None)
            continue
        axis = next((a for a, stride in enumerate(strides) if 0 < stride <= run.stride and stored_shape[a] > 1), None)
        if axis is None or axis in axes or run.stride % strides[axis]:
            return None
        step = run.stride // strides[axis]
        end = first[axis] + step * (len(run.indices) - 1) + 1
        if end > stored_shape[axis]:
            return None
        stored[axis] = range(first[axis], end, step)
        axes.append(axis)
    ones = [axis for axis, size in enumerate(stored_shape) if size == 1]  # axes of one index, in their order
    axes = [
        ones.pop(0) if axis is None and size == 1 and ones else axis for axis, size in zip(axes, shape, strict=True)
    ]
    return Piece(tensor, stored_shape, tuple(run.indices for run in runs), tuple(stored), tuple(axes))

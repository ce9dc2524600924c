"""Calls of modules, and the tensors in their arguments and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STILL = 1e-5  # what moves by less than this part of a nudge did not move
_PARALLEL = 0.9999  # cosine of two changes of activations


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module or an operation: copies of its arguments, and of its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def inputs(self) -> dict[int | str, Tensor]:
        """The float arguments with two axes or more, by position or keyword."""
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {key: x for key, x in named if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2}

    @property
    def result(self) -> Tensor | None:
        """The first tensor of the output if it holds floats."""
        return first_float(self.output)


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    """The argument at a position or keyword."""
    return args[key] if isinstance(key, int) else kwargs[key]


def with_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one of them replaced, by position or keyword."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), dict(kwargs)
    return args, {**kwargs, key: value}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's output: a tensor, a tuple, a list, a mapping or a ModelOutput."""
    if isinstance(value, Tensor):
        yield value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for item in items:
        yield from tensors_in(item)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a module's output."""
    return next(tensors_in(value), None)


def first_float(value: Any) -> Tensor | None:
    """The first tensor in a module's output if it holds floats."""
    tensor = first_tensor(value)
    return tensor if tensor is not None and tensor.is_floating_point() else None


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, Mapping):
        key = next(key for key, item in value.items() if first_tensor(item) is not None)
        changed = {k: with_first_tensor(item, tensor) if k == key else item for k, item in value.items()}
        return _like(value, changed)
    index = next(index for index, item in enumerate(value) if first_tensor(item) is not None)
    return _like(value, [with_first_tensor(item, tensor) if i == index else item for i, item in enumerate(value)])


def copied(value: Any) -> Any:
    """A copy with tensors of its own (some classes work in place); caches and other objects stay what they are."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return _like(value, [copied(item) for item in value])
    if isinstance(value, dict):
        return _like(value, {key: copied(item) for key, item in value.items()})
    return value


def _like(value: Any, items: Any) -> Any:
    """A container of the type of ``value``: a list, a (named) tuple, a dict or a ModelOutput."""
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(**items) if isinstance(value, dict) and type(value) is not dict else type(value)(items)


def rows(tensor: Tensor) -> Tensor:
    """A tensor ``[..., n]`` as rows ``[-1, n]`` in float64."""
    return tensor.reshape(-1, tensor.shape[-1]).double()


def joined(calls: Iterable[Call]) -> Tensor:
    """The outputs of several calls as rows ``[rows of all calls, width]``, float64."""
    return torch.cat([rows(call.result) for call in calls if call.result is not None])


def parallel(change: Tensor, along: Tensor) -> Tensor | None:
    """The factor of each row if every row of ``change`` is a multiple of its row of ``along``; None if one is not.

    Args:
        change: ``[..., n]``; rows that did not move (less than a thousandth of the longest) do not count.
        along: ``[..., n]`` with as many rows, or one row.
    """
    moved, wanted = rows(change), rows(along)
    if len(wanted) not in (1, len(moved)):
        return None
    lengths = moved.norm(dim=1)
    counts = lengths > 1e-3 * lengths.max()
    dots = (moved * wanted).sum(1)
    squares = (wanted * wanted).sum(1).expand(len(moved))
    cosines = dots.abs() / (lengths * squares.sqrt() + 1e-30)
    return dots / (squares + 1e-30) if bool((cosines[counts] > _PARALLEL).all()) else None

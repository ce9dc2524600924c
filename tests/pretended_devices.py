"""Devices that are only pretended, so that a model can be split over several of them on a machine without a GPU.

Their tensors are on the CPU, and say that they are elsewhere. An operation on tensors of different devices is an
error, as on GPUs, but for single numbers, indices and copies from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

KIND = "privateuseone"
DEVICES = tuple(torch.device(KIND, index) for index in range(2))
CPU = torch.device("cpu")
_COPIES = ("copy_", "__setitem__", "set_")
_MOVES = ("to", "cpu", "cuda")


class Placed(Tensor):
    """A tensor that says it is on ``place``."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def place_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "place", CPU)


def placed(tensor: Tensor, place: torch.device) -> Tensor:
    if place.type != KIND:
        return tensor
    result = tensor.as_subclass(Placed)
    result.place = place
    return result


def plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Placed) else value


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch on the tensors themselves; its results are where its operands are, or where it says."""
    name = getattr(func, "__name__", "")
    if func is torch.device:
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__" and func.__self__ is Tensor.device:
            place = getattr(args[0], "place", None)
            return place if place is not None else func(*args)
        if name in ("__get__", "__set__"):
            return attribute(func, name, args)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        wanted, (args, kwargs) = asked_for(args, kwargs)
        if name == "cpu":
            wanted = CPU
        if name not in _MOVES and name not in _COPIES:
            check(name, tensors)
        places = [place_of(each) for each in tensors if place_of(each) != CPU]
        place = wanted if wanted is not None else place_of(tensors[0]) if name in _COPIES else (places or [CPU])[0]
        own = tree_map(plain, tuple(args))
        if name == "histc" and not own[0].is_floating_point():  # a GPU counts integers, too
            own = (own[0].float(), *own[1:])
        result = func(*own, **tree_map(plain, kwargs))
        if own and result is own[0] and place == place_of(args[0]):  # moved to where it is
            return args[0]
        if own and result is own[0]:
            result = result.clone()
        if own and name.endswith("_") and not name.endswith("__") and isinstance(args[0], Placed):
            return args[0]
        return tree_map(lambda each: placed(each, place) if isinstance(each, Tensor) else each, result)


def attribute(func: Any, name: str, args: Sequence[Any]) -> Any:
    owner = args[0]
    result = func(*args) if name == "__set__" else func(owner)
    if isinstance(result, Tensor) and isinstance(owner, Placed):
        return placed(result, owner.place)
    if name == "__set__" and isinstance(args[1], Placed):
        owner.place = args[1].place
    return result


def asked_for(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple[Any, dict[str, Any]]]:
    """The device that a call names; and its arguments with the CPU in place of a pretended one."""
    named = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device)]
    if isinstance(kwargs.get("device"), str):
        named.append(torch.device(kwargs["device"]))
    named += [torch.device(each) for each in args[1:2] if each == "cpu"]

    def here(value: Any) -> Any:
        return CPU if isinstance(value, torch.device) and value.type == KIND else value

    changed = tuple(map(here, args)), {key: here(value) for key, value in kwargs.items()}
    return (named[0] if named else None), changed


def check(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError if an operation's operands are on different devices."""
    indexing = name == "__getitem__"
    places = {place_of(each) for each in tensors if not (place_of(each) == CPU and (each.ndim == 0 or indexing))}
    if len(places) > 1:
        raise RuntimeError(f"{name}: tensors are on {', '.join(sorted(map(str, places)))}")


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[None]:
    """Inside the block there are pretended devices."""
    with _Mode():
        yield

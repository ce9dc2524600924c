"""The residual stream at each block of a loaded model, and single blocks run again with parts of them held."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import Call, argument, copied, first_tensor, with_argument, with_first_tensor
from ollama_forge.architectures.roles.blocks import stream_argument
from ollama_forge.architectures.roles.region import owns_matrix

Inputs = Mapping[str, Any]


def vectors(stream: Tensor, d: int) -> Tensor:
    """A stream of one or several copies as float64 ``[n, d]``."""
    return stream.detach().reshape(-1, d).double()


def largest(values: Tensor) -> float:
    """The largest of values that are not negative; 1 if one is not finite, 0 if there is none."""
    return float(torch.nan_to_num(values, nan=1.0, posinf=1.0).max()) if values.numel() else 0.0


def share_along(stream: Tensor, direction: Tensor) -> float:
    """The largest ``|r.h| / |h|`` over all vectors of a stream, for a unit vector ``r`` ``[d]``."""
    h = vectors(stream, len(direction))
    lengths = torch.linalg.vector_norm(h, dim=1)
    return largest((h @ direction.double()).abs()[lengths != 0] / lengths[lengths != 0])


def shifted(stream: Tensor, shift: Tensor) -> Tensor:
    """A stream with ``shift`` ``[d]`` added to each of its vectors."""
    return (stream.reshape(-1, len(shift)) + shift).reshape(stream.shape)


def without(stream: Tensor, direction: Tensor) -> Tensor:
    """A stream without its components along a unit vector ``[d]``."""
    h, r = vectors(stream, len(direction)), direction.double()
    return (h - torch.outer(h @ r, r)).to(stream.dtype).reshape(stream.shape)


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass without gradients."""
    with torch.no_grad():
        return model(**copied(dict(inputs)))


def matrix_owners(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that own a matrix and contain no other such module."""
    owners = dict.fromkeys(module for module in modules if owns_matrix(module))
    return [m for m in owners if not any(inner is not m and inner in owners for inner in m.modules())]


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record every call of the modules while the block runs, with the output before any other hook changes it."""
    seen: dict[nn.Module, list[Call]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.setdefault(module, []).append(Call(copied(args), copied(kwargs), copied(output)))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True, prepend=True).remove)
        yield seen


@contextmanager
def held(calls: Mapping[nn.Module, Sequence[Call]], silent: Collection[nn.Module] = ()) -> Iterator[None]:
    """Every recorded module gives its recorded outputs while the block runs, or zeros if it is ``silent``."""
    counts = dict.fromkeys(calls, 0)

    def give(module: nn.Module, args: Any, output: Any) -> Any:
        recorded = copied(calls[module][min(counts[module], len(calls[module]) - 1)].output)
        counts[module] += 1
        first, now = first_tensor(recorded), first_tensor(output)
        if module in silent and now is not None:
            return with_first_tensor(copied(output), torch.zeros_like(now))
        same = first is not None and now is not None and first.shape == now.shape
        return recorded if same else output  # a router may send other tokens

    with ExitStack() as hooks:
        for module in calls:
            hooks.callback(module.register_forward_hook(give).remove)
        yield


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Attributes:
        layer: number of the block.
        module: the block.
        stream: position or keyword of the argument that is the residual stream.
        args, kwargs: copies of the arguments.
        leaving: the stream behind the block.
    """

    layer: int
    module: nn.Module
    stream: int | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaving: Tensor

    @property
    def entering(self) -> Tensor:
        """The stream in front of the block."""
        found: Tensor = argument(self.args, self.kwargs, self.stream)
        return found

    def again(self, entering: Tensor | None = None) -> Tensor:
        """Run the block once more, with another stream in front of it if one is given; the stream behind it."""
        args, kwargs = copied(self.args), copied(dict(self.kwargs))
        if entering is not None:
            args, kwargs = with_argument(args, kwargs, self.stream, entering.clone())
        with torch.no_grad():
            leaving = first_tensor(self.module(*args, **kwargs))
        assert leaving is not None
        return leaving.clone()


class Blocks:
    """The blocks of a loaded model.

    A block's stream is its first float argument of the shape of its output.

    Args:
        paths: path of each block.
        d: width of the residual stream; a stream of several copies has a multiple of it.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], d: int) -> None:
        self.model, self.paths, self.d = model, tuple(paths), d
        self.modules = [model.get_submodule(path) for path in paths]

    def calls(self, inputs: Inputs) -> list[BlockCall]:
        """The calls of the blocks in one forward pass, in order; calls without a stream are left out."""
        found: list[BlockCall] = []
        entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        numbers = {module: number for number, module in enumerate(self.modules)}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append((copied(args), copied(kwargs)))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            arguments, leaving = entered.pop(), first_tensor(output)
            if leaving is None or leaving.shape[-1] % self.d:
                return
            key = stream_argument(*arguments, leaving.shape)
            if key is not None:
                found.append(BlockCall(numbers[module], module, key, *arguments, leaving.clone()))

        with ExitStack() as hooks:
            for module in self.modules:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            run_model(self.model, inputs)
        return found

    @property
    def outside(self) -> list[nn.Module]:
        """The modules outside the blocks."""
        inside = {module for block in self.modules for module in block.modules()}
        return [module for module in self.model.modules() if module not in inside]

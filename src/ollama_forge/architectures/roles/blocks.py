"""The blocks of a twin, found by what they take in and give out, and the regions between points of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import argument, copied, first_tensor, with_argument
from ollama_forge.architectures.roles.region import Region, owns_matrix
from ollama_forge.architectures.twin.build import Twin


class _Stop(BaseException):
    """Ends a forward pass at the first block; no class of model catches it."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block.

    Attributes:
        block: the module.
        args, kwargs: copies of its arguments.
        key: which argument is the stream, by position or keyword.
        taken, given: the stream before and after.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: int | str
    taken: Tensor
    given: Tensor


@dataclass
class _Frame:
    """A call in progress; ``matched`` once it gave a tensor of the shape of one that it took."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parent: _Frame | None
    matched: bool = False

    @property
    def inside_a_match(self) -> bool:
        return self.parent is not None and (self.parent.matched or self.parent.inside_a_match)


def find_block_calls(twin: Twin) -> list[BlockCall]:
    """The calls of all blocks in their order: items of module lists that map the stream to one of the same shape.

    A block inside a block (an attention layer that loops) does not count.
    """
    found: list[tuple[_Frame, BlockCall]] = []
    open_frames: list[_Frame] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parent = open_frames[-1] if open_frames else None
        open_frames.append(_Frame(module, copied(args), copied(kwargs), parent))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frame = open_frames.pop()
        given = first_tensor(output)
        if given is None or given.dim() < 3 or not given.is_floating_point():
            return
        key = stream_argument(frame.args, frame.kwargs, given.shape)
        if key is not None:
            frame.matched = True
            taken = argument(frame.args, frame.kwargs, key)
            found.append((frame, BlockCall(module, frame.args, frame.kwargs, key, taken.clone(), given.clone())))

    with ExitStack() as hooks:
        for module in _items(twin.model):
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        twin.run()
    return [call for frame, call in found if not frame.inside_a_match]


def _items(model: nn.Module) -> list[nn.Module]:
    """The items of module lists that own a matrix and are more than one matrix."""
    lists = (m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)))
    items = (item for a_list in lists for item in a_list.children())
    return [
        item
        for item in dict.fromkeys(items)
        if any(owns_matrix(module) for module in item.modules() if module is not item)
    ]


def stream_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> int | str | None:
    """Which argument has the stream's shape: its position or keyword."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape:
            return key
    return None


@dataclass(frozen=True, eq=False)
class StreamShape:
    """How the stream lies in the tensors of a twin.

    Attributes:
        tokens: ``[batch, tokens]``.
        d_model: width of the stream; a tensor's last axis may hold several copies of it side by side.
    """

    tokens: torch.Size
    d_model: int

    def split(self, stream: Tensor) -> Tensor:
        """A tensor that holds the stream as ``[all tokens, copies, d]``."""
        if stream.shape[:2] != self.tokens and stream.shape[1:3] == self.tokens:  # the copies come first
            stream = stream.movedim(0, 2)
        side_by_side = stream.shape[-1] // self.d_model
        copies = stream[0, 0].numel() // self.d_model if stream.shape[:2] == self.tokens else side_by_side
        return stream.reshape(-1, copies, self.d_model)


def first_region(twin: Twin, calls: list[BlockCall], shape: StreamShape) -> Region:
    """The region from the token ids to the first block."""
    inside = {module for call in calls for module in call.block.modules()}
    first, taken = calls[0].block, calls[0].taken.shape

    def run(_: Tensor | None) -> Tensor:
        got: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            key = stream_argument(args, kwargs, taken)
            if key is not None:
                got.append(argument(args, kwargs, key))
                raise _Stop

        with ExitStack() as hooks, torch.inference_mode():
            hooks.callback(first.register_forward_pre_hook(stop, with_kwargs=True).remove)
            with suppress(_Stop):
                twin.model(**twin.inputs)
        return shape.split(got[0])

    return Region(run, [module for module in twin.model.modules() if module not in inside])


def block_region(call: BlockCall, shape: StreamShape, *, module: str, block: int) -> Region:
    """The region of one call of a block."""

    def run(nudge: Tensor | None) -> Tensor:
        args, kwargs = copied(call.args), copied(dict(call.kwargs))
        if nudge is not None:
            moved = argument(args, kwargs, call.key) + nudge.repeat(call.taken.shape[-1] // shape.d_model)
            args, kwargs = with_argument(args, kwargs, call.key, moved)
        with torch.inference_mode():
            given = first_tensor(call.block(*args, **kwargs))
        assert given is not None  # it gave one when it was recorded
        return shape.split(given)

    return Region(run, call.block.modules(), module=module, block=block)


def first_calls(calls: list[BlockCall]) -> list[BlockCall]:
    """The first call of each block: a model that loops calls a block several times."""
    return list({call.block: call for call in reversed(calls)}.values())[::-1]

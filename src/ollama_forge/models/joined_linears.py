"""Join packed linear layers that read the same input into one product, for decode steps on a CPU.

A step multiplies a few rows by every weight, so that much of its time is the cost of a call. The layers that share an
input (queries, keys and values; gate and up) are found by running the model. Results may differ in the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ollama_forge.models.cpu_packing import PackedForward, packed_layers
from ollama_forge.models.device import memory_available

_ROOM = 1.5  # free memory required, as a multiple of the size of the joined weights


class JoinedLinears:
    """The joined layers of a module; each keeps its own weight, and its place in the module.

    Args:
        run: runs the module on some tokens.

    Attributes:
        groups: the layers of each product, in the order of their calls; none if memory cannot hold their weights twice.
    """

    def __init__(self, module: nn.Module, run: Callable[[], object]) -> None:
        self.groups = _same_input(packed_layers(module), run)
        self._before: list[tuple[nn.Module, Any]] = []
        size = sum(linear.weight.nbytes for group in self.groups for linear in group)
        if memory_available(torch.device("cpu")) < _ROOM * size:
            self.groups = []
        with torch.inference_mode():
            for group in self.groups:
                product = _Product(group)
                for index, linear in enumerate(group):
                    self._before.append((linear, linear.__dict__["forward"]))
                    linear.forward = _JoinedForward(product, index)  # type: ignore[method-assign]

    def undo(self) -> None:
        """Compute each layer alone again."""
        for linear, forward in self._before:
            linear.__dict__["forward"] = forward
        self.keep()
        self.groups = []

    def keep(self) -> None:
        """Free what ``undo`` needs."""
        self._before = []


class _Product:
    """The product of the joined weights, from the call of the first layer until that of the last one."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.forward = PackedForward(weight, torch.cat(biases) if biases else None)
        self._held: tuple[Tensor, Sequence[Tensor]] | None = None

    def output(self, index: int, input: Tensor) -> Tensor:
        held = self._held
        if index == 0 or held is None or held[0] is not input:
            # a model may need contiguous outputs
            outputs = [output.contiguous() for output in torch.split(self.forward(input), self.sizes, -1)]
            held = input, outputs
        self._held = held if index < len(self.sizes) - 1 else None
        return held[1][index]


class _JoinedForward(PackedForward):
    """Replaces ``nn.Linear.forward``."""

    def __init__(self, product: _Product, index: int) -> None:
        self.weight, self.bias = product.forward.weight, product.forward.bias
        self._product, self._index = product, index

    def __call__(self, input: Tensor) -> Tensor:
        return self._product.output(self._index, input)


def _same_input(linears: Sequence[nn.Linear], run: Callable[[], object]) -> list[list[nn.Linear]]:
    """The groups of layers, each called once in a run, that are given one tensor, which nothing changes in between."""
    calls = _Calls()
    with ExitStack() as stack:
        for linear in linears:
            stack.callback(linear.register_forward_pre_hook(calls.add).remove)
        stack.enter_context(calls)
        run()
    times = Counter(id(linear) for _, group in calls.groups for linear in group)
    found: list[list[nn.Linear]] = []
    for _, group in calls.groups:
        for biased in (False, True):
            same = [linear for linear in group if times[id(linear)] == 1 and (linear.bias is not None) == biased]
            if len(same) > 1:
                found.append(same)
    return found


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls of layers inside the block, by input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups: list[tuple[Tensor, list[nn.Linear]]] = []
        self._open: dict[int, list[nn.Linear]] = {}  # groups by the id of their input, which is as it was

    def add(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        if not args:
            return
        group = self._open.get(id(args[0]))
        if group is None:
            group = self._open[id(args[0])] = []
            self.groups.append((args[0], group))  # holds the input, so that its id stays its own
        group.append(linear)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for written in _written(func, args, kwargs or {}):
            memory = written.untyped_storage().data_ptr()
            for input, _ in self.groups:
                if input.untyped_storage().data_ptr() == memory:
                    self._open.pop(id(input), None)
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation changes."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    yield tensor

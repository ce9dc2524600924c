"""Exchange parameters of a loaded model for edited copies, and put the originals back.

The copies take as much memory as the originals (gpt-oss-20b in bf16, per layer: ``down`` 0.53 GB, ``gate_up`` 1.06 GB).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_map import Place
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.edits.factors import edit_matrix
from ollama_forge.edits.plan import MatrixEdit
from ollama_forge.files import human_size
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.cpu_packing import unpacked
from ollama_forge.models.matrices import as_slice, bias_at, bias_of, bias_parameter, parameter_of, weight_at, weight_of
from ollama_forge.progress import say

_SHARE_OF_FREE_MEMORY = 0.75


@dataclass(frozen=True)
class Part:
    """An edit, and one of the places of its matrix."""

    edit: MatrixEdit
    place: Place

    @property
    def of_stack(self) -> bool:
        """Whether the place is in a stack of experts."""
        return self.edit.matrix.experts or self.place.expert is not None


class EditedCopies:
    """A parameter with all edits of its parts, and the biases that these edits change.

    Args:
        parts: the edits of one parameter.
        originals: the original values of every parameter that is exchanged now; shared by all copies, because an edit
            may need rows of its matrix that are in another parameter.
    """

    def __init__(self, model: ChatModel, parts: Sequence[Part], originals: dict[nn.Parameter, Tensor]) -> None:
        self.model, self.parts, self._originals = model, parts, originals
        self.parameter = parameter_of(model, parts[0].place)
        biases = [bias_parameter(model, part.place) for part in parts if _edits_bias(part)]
        self.parameters = tuple({id(p): p for p in (self.parameter, *biases)}.values())

    @property
    def size(self) -> int:
        """Bytes of the edited copies."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def layer(self) -> int | None:
        """The layer of a stack of experts, which may be edited while its layer runs; None for any other parameter."""
        first = self.parts[0]
        return first.edit.matrix.layer if first.of_stack else None

    def _original(self, parameter: nn.Parameter) -> Tensor:
        return self._originals.get(parameter, parameter.data)

    @torch.no_grad()
    def exchange(self, *_: Any) -> None:
        copies = {parameter: self._original(parameter).clone() for parameter in self.parameters}
        for part in self.parts:
            for expert in experts_of(part.edit.matrix):
                self._write(part, expert, copies)
        for parameter, copy in copies.items():
            self._originals[parameter] = parameter.data
            parameter.data = copy

    def _write(self, part: Part, expert: int | None, copies: dict[nn.Parameter, Tensor]) -> None:
        """Write the edited rows of one matrix into the copies."""
        edit, place, model = part.edit, part.place, self.model
        here = as_slice(place.stored_rows)
        weight = weight_of(model, edit.matrix, expert, self._original)
        result = edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert)
        weight_at(copies[self.parameter], place, expert).copy_(result.weight[here])
        if _edits_bias(part) and edit.bias_edit is not None:
            bias = bias_of(model, edit.matrix, expert, self._original)
            edited = bias + edit.bias_edit.shift(bias, result, edit.strength, expert)
            bias_at(copies[bias_parameter(model, place)], place, expert).copy_(edited[here])

    def restore(self, *_: Any) -> None:
        for parameter in self.parameters:
            if parameter in self._originals:
                parameter.data = self._originals.pop(parameter)


def _edits_bias(part: Part) -> bool:
    return part.edit.bias_edit is not None and part.place.bias is not None


def exchange_copies(model: ChatModel, copied: Sequence[EditedCopies], free: int | None, stack: ExitStack) -> None:
    """Exchange parameters for edited copies until ``stack`` closes.

    A stack of experts whose copy does not fit into memory is edited at every forward pass, and only while its layer
    runs; so is every parameter of a model that is streamed from disk.

    Args:
        free: bytes free on the device; None if unknown. Copies take at most three quarters of it, the rest is left for
            activations.
    """
    for copies in copied:
        _unpack(model, copies, stack)
    sizes = [copies.size for copies in copied]
    budget = math.inf if free is None else _SHARE_OF_FREE_MEMORY * free
    if sum(sizes) > budget:
        budget -= _largest_layer(copied)  # reserved for the layer that is edited while it runs
    per_forward = 0
    for copies, size in zip(copied, sizes, strict=True):
        if model.streams:
            for module in _modules_of(model, copies):
                _exchange_while_it_runs(module, copies, stack)
        elif size <= budget or copies.layer is None:
            budget -= size
            stack.callback(copies.restore)
            copies.exchange()
        else:
            per_forward += 1
            _exchange_while_it_runs(model.layer(copies.layer), copies, stack)
    if per_forward:
        say(
            f"note: edited copies of the experts need {human_size(sum(sizes))}, but {human_size(free or 0)} are free: "
            f"{per_forward} of {len(copied)} stacks are edited at every forward pass, which is slow"
        )


def _exchange_while_it_runs(module: nn.Module, copies: EditedCopies, stack: ExitStack) -> None:
    stack.callback(module.register_forward_pre_hook(copies.exchange).remove)
    stack.callback(module.register_forward_hook(copies.restore, always_call=True).remove)


def _modules_of(model: ChatModel, copies: EditedCopies) -> list[nn.Module]:
    """The modules of a streamed model with whose weights the parameter is in memory."""
    layer = copies.parts[0].edit.matrix.layer
    if layer is not None:
        return [model.layer(layer)]
    owners = (model.submodule(copies.parts[0].place), model.head)
    found = [m for m in owners if m is not None and any(p is copies.parameter for p in m.parameters(recurse=False))]
    return list(dict.fromkeys(found))


def _largest_layer(copied: Sequence[EditedCopies]) -> int:
    """Bytes of the copies of all stacks of the layer that needs most."""
    layers: dict[int, int] = defaultdict(int)
    for copies in copied:
        if copies.layer is not None:
            layers[copies.layer] += copies.size
    return max(layers.values(), default=0)


def _unpack(model: ChatModel, copies: EditedCopies, stack: ExitStack) -> None:
    """Let the modules that hold the parameter compute with it, and not with a packed copy."""
    for module in (model.submodule(copies.parts[0].place), model.head):
        if module is not None and any(parameter is copies.parameter for parameter in module.parameters(recurse=False)):
            stack.enter_context(unpacked(module))

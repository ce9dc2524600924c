"""Which tensors of a checkpoint hold which parameters of the model of its config."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ollama_forge.architectures.learned import LearnedArchitecture
from ollama_forge.architectures.names.boxes import Box, boxes, mismatch, whole
from ollama_forge.architectures.names.counterparts import Counterparts
from ollama_forge.architectures.names.locate import saved_tensors
from ollama_forge.architectures.names.pieces import ExpectedPiece, Shape, StoredNames
from ollama_forge.architectures.names.spelling import Spelling

INCOMPLETE_HINT = "download or save it again; check that model_type in config.json is the model's own"


class Layout:
    """The tensors of a checkpoint, and the model of its config.

    Attributes:
        model: the model, on the meta device.
        spelling: reads stored names for the model.
        tensors: the shape of each tensor by its name, packed ones after decoding.
        spelled: how transformers reads each name.
        parameters: the shapes of the model's parameters and persistent float buffers; tied ones once.
        counterparts: the twin's parameters that they are like.
        held: for each parameter that is located as a whole, its pieces with the names of the tensors that hold them.
        as_is: for each parameter that is stored as it is in memory although its twin is not, the name of the tensor.
        lacking: for each parameter that is not located, a stored name that the checkpoint lacks.
        nowhere: parameters that are stored in an order that no few boxes express, or that the twin has none like.

    Raises:
        ForgeError: a block of the model has other parameters than every block of the twin.
    """

    def __init__(self, learned: LearnedArchitecture, model: Any, shapes: Mapping[str, Shape]) -> None:
        self.model, self.spelling = model, Spelling(model)
        self.tensors = dict(shapes)
        self.spelled = self.spelling.read(self.tensors)
        self.parameters = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
        self.counterparts = Counterparts(learned, model, self.parameters)
        self.held: dict[str, list[tuple[ExpectedPiece, str]]] = {}
        self.as_is: dict[str, str] = {}
        self.lacking: dict[str, str] = {}
        self.nowhere: set[str] = set()
        self._locate(StoredNames(learned.parameters))

    @cached_property
    def head(self) -> str | None:
        """The name of the unembedding's weight, tied or not; None if the model has no head."""
        head = self.model.get_output_embeddings()
        path = next((name for name, module in self.model.named_modules() if head is not None and module is head), None)
        return None if path is None else f"{path}.weight"

    @cached_property
    def targets(self) -> dict[str, list[str]]:
        """For each parameter and buffer of the model, tied ones by each of their names, the tensors that fill it."""
        out: dict[str, list[str]] = {}
        for name, spelled in self.spelled.items():
            for target in spelled.targets:
                out.setdefault(target, []).append(name)
        return out

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """The other names of each parameter that is tied."""
        of_tensor: dict[int, list[str]] = {}
        for name, tensor in self.spelling.names.items():
            of_tensor.setdefault(id(tensor), []).append(name)
        groups = [names for names in of_tensor.values() if len(names) > 1]
        return {name: [other for other in names if other != name] for names in groups for name in names}

    @cached_property
    def boxes(self) -> dict[str, list[Box]]:
        """The boxes of each parameter that is located.

        Raises:
            ForgeError: a tensor's shape contradicts the parameter's.
        """
        found = boxes(self.held, self.parameters, self.tensors)
        for parameter, tensor in self.as_is.items():
            if self.tensors[tensor] != self.parameters[parameter]:
                raise mismatch(tensor, self.tensors[tensor], parameter, self.parameters[parameter])
            found[parameter] = [whole(parameter, tensor, self.parameters[parameter])]
        return found

    def _locate(self, names: StoredNames) -> None:
        expected = {
            name: names.expected(self.counterparts.found[name], shape)
            for name, shape in self.parameters.items()
            if name in self.counterparts.found
        }
        wanted = {piece.tensor for pieces in expected.values() for piece in pieces} - set(self.tensors)
        keys = {name: spelled.key for name, spelled in self.spelling.read(wanted).items()}
        by_key = {spelled.key: name for name, spelled in self.spelled.items()}
        for parameter in self.parameters:
            stored = [
                (piece, piece.tensor if piece.tensor in self.tensors else by_key.get(keys[piece.tensor]))
                for piece in expected.get(parameter, [])
            ]
            held = [(piece, tensor) for piece, tensor in stored if tensor is not None]
            complete = bool(held) and len(held) == len(stored)
            as_is = self._turned(parameter, held) if complete else self._as_is(parameter)
            if as_is is not None:
                self.as_is[parameter] = as_is
            elif complete:
                self.held[parameter] = held
            elif self._fillers(parameter) and not held:
                self.nowhere.add(parameter)
            else:
                self.lacking[parameter] = next((piece.tensor for piece, tensor in stored if tensor is None), parameter)

    def _fillers(self, parameter: str) -> list[str]:
        """The tensors that fill a parameter, under any of its names."""
        names = (parameter, *self.aliases.get(parameter, ()))
        return [tensor for name in names for tensor in self.targets.get(name, ())]

    def _as_is(self, parameter: str) -> str | None:
        """The tensor that is stored as the parameter is in memory, under its name there."""
        fillers = self._fillers(parameter)
        return next((name for name in fillers if not self.spelled[name].converted), None)

    def _turned(self, parameter: str, held: list[tuple[ExpectedPiece, str]]) -> str | None:
        """The tensor of a parameter that ``save_pretrained`` transposes, if its shape tells that this one is not."""
        (piece, tensor), shape = held[0], self.parameters[parameter]
        axes = [axis for axis in piece.twin.axes if axis is not None]
        if len(held) > 1 or len(axes) < len(shape) or axes == sorted(axes):
            return None
        turned = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        return tensor if self.tensors[tensor] == shape != turned else None

"""The matrices of a checkpoint: one for each stored tensor that holds parameters with a role."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from ollama_forge.architectures.learned import LearnedArchitecture, NormFound, RoleFound
from ollama_forge.architectures.model_map import Matrix, Norm, Place, Role
from ollama_forge.architectures.names.boxes import MISMATCH_HINT, Box, mismatch
from ollama_forge.architectures.names.counterparts import Counterpart
from ollama_forge.architectures.names.layout import Layout
from ollama_forge.errors import ForgeError

_FUSED = (
    (Role.QKV, {Role.Q, Role.K, Role.V, Role.QKV}),
    (Role.GATE_UP, {Role.GATE, Role.UP, Role.GATE_UP}),
    (Role.MIXER, {Role.Q, Role.K, Role.V, Role.QKV, Role.MIXER}),
)
_MOST = 0.7  # share of a part's examined rows: a clamp bends some of up's, a ReLU leaves some of gate's straight


class UnmappedError(Exception):
    """A tensor that no ``Matrix`` can describe; the message is a sentence."""


class MatrixBuilder:
    """Builds the matrices of a checkpoint.

    Attributes:
        d_model: width of the residual stream.
        gaps: a sentence for each parameter or tensor with a role that has no matrix.
    """

    def __init__(self, learned: LearnedArchitecture, layout: Layout) -> None:
        self.learned, self.layout = learned, layout
        self.gaps: list[str] = []
        self.numbers = {block: number for number, block in enumerate(layout.counterparts.blocks)}
        self.d_model = self._width()

    def matrices(self) -> list[Matrix]:
        """The matrices, in the order of the model's parameters."""
        by_tensor: dict[str, list[tuple[Box, Counterpart | None, RoleFound | None]]] = {}
        for parameter in self.layout.parameters:
            counterpart = self.layout.counterparts.found.get(parameter)
            role = self._role(counterpart)
            if role is not None and parameter in self.layout.nowhere:
                self.gaps.append(f"{parameter} is stored in a form whose order was not found out")
            for box in self.layout.boxes.get(parameter, ()):
                by_tensor.setdefault(box.tensor, []).append((box, counterpart, role))
        self.gaps += [
            f"{name} is not like one parameter that was examined" for name in sorted(self.layout.counterparts.unclear)
        ]
        found = []
        for tensor, parts in by_tensor.items():
            if any(role is not None for _, _, role in parts):
                try:
                    found.append(self._matrix(tensor, parts))
                except UnmappedError as reason:
                    self.gaps.append(str(reason))
        head = self._stored_tied_head()
        return found if head is None else [*found, head]

    def _width(self) -> int:
        for embedding_first in (True, False):
            for parameter, counterpart in self.layout.counterparts.found.items():
                role = self._role(counterpart)
                if role is not None and role.writes and (role.role is Role.EMBEDDING or not embedding_first):
                    return self.layout.parameters[parameter][role.axis]
        raise ForgeError("nothing in the model writes to the residual stream", "give a language model")

    def _role(self, counterpart: Counterpart | None) -> RoleFound | None:
        """The role of a parameter; a tied embedding reads the stream too, as the head, but is an embedding."""
        roles = [] if counterpart is None else self.layout.counterparts.roles.get(counterpart.twin, [])
        return next((role for role in roles if role.writes), roles[0] if roles else None)

    def _matrix(self, tensor: str, parts: list[tuple[Box, Counterpart | None, RoleFound | None]]) -> Matrix:
        """One matrix of all parts of a tensor."""
        found: list[Matrix] = []
        for box, counterpart, role in parts:
            if role is None or counterpart is None:
                raise UnmappedError(
                    f"{tensor} holds {box.parameter} too, which neither reads nor writes the residual stream"
                )
            found.append(self._part(box, counterpart, role))
        first, *others = found
        roles = {matrix.role for matrix in found}
        fused = first.role if len(roles) == 1 else next((whole for whole, parts_ in _FUSED if roles <= parts_), None)
        if fused is None or any(replace(other, role=first.role, places=first.places) != first for other in others):
            held = ", ".join(sorted({box.parameter for box, _, _ in parts}))
            raise UnmappedError(f"{tensor} holds parameters of different roles: {held}")
        return replace(first, role=fused, places=tuple(place for matrix in found for place in matrix.places))

    def _part(self, box: Box, counterpart: Counterpart, role: RoleFound) -> Matrix:
        """The matrix of one part of a tensor."""
        word = role.role
        if word is None:
            raise UnmappedError(f"what {box.parameter} is for was not found out")
        norms = tuple(self._norm(norm, counterpart) for norm in role.norms)
        if not role.writes and len(norms) > 1:
            raise UnmappedError(f"{box.parameter} reads the residual stream through several norms")
        orientation = self._orientation(box, role)
        expert, experts = self._expert(box, role)
        rows, stored_rows = self._rows(box, orientation, role)
        module = counterpart.renamed(role.module)
        bias = None if role.bias is None else counterpart.renamed(role.bias)
        place = Place(
            module,
            counterpart.parameter.removeprefix(f"{module}."),
            bias=None if bias is None else bias.removeprefix(f"{module}."),
            transposed=orientation.transposed,
            expert=expert,
            rows=rows,
            stored_rows=stored_rows,
            linear=role.linear,
        )
        return Matrix(
            tensor=box.tensor,
            role=word if rows is None else _role_of_rows(role, box.twin[orientation.out or 0]) or word,
            layer=self._layer(counterpart, role),
            shape=self.layout.tensors[box.tensor],
            places=(place,),
            writes=role.writes,
            bias=None if bias is None else self._bias(bias, box, orientation, expert, experts),
            reads=None if role.writes or not norms else norms[0],
            stream_at=self._stream_at(box, role),
            post_norms=norms if role.writes else (),
            transposed=orientation.stored_transposed,
            experts=experts,
            expert=counterpart.number if expert is None else expert,
        )

    def _orientation(self, box: Box, role: RoleFound) -> _Orientation:
        """Which axes of the parameter are out and in.

        Raises:
            UnmappedError: the tensor is not one matrix, a stack of them or a vector, along the whole stream.
            ForgeError: the axis of the stream has another length.
        """
        parameter, stored = self.layout.parameters[box.parameter], self.layout.tensors[box.tensor]
        stream, size = role.axis, parameter[role.axis]
        if size != self.d_model and role.stream_at == (0,):
            raise ForgeError(
                f"axis {stream} of {box.parameter} {parameter} is not the width of the residual stream, {self.d_model}",
                MISMATCH_HINT,
            )
        others = [axis for axis in range(len(parameter)) if axis not in (stream, role.expert_axis)]
        on_disk = [box.axes[axis] for axis in (*others, stream)]
        stack = role.expert_axis is not None and box.axes[role.expert_axis] is not None
        if len(others) > 1 or None in on_disk or len(on_disk) != len(stored) - stack or not self._is_whole(box, stream):
            raise UnmappedError(f"{box.tensor} {stored} does not hold {box.parameter} as one matrix")
        if not others:
            return _Orientation(None, None, transposed=False, stored_transposed=False)
        rows_are_written = role.role in (Role.EMBEDDING, Role.POSITION)
        out, in_ = (stream, others[0]) if role.writes and not rows_are_written else (others[0], stream)
        return _Orientation(out, in_, out > in_, (box.axes[out] or 0) > (box.axes[in_] or 0))

    def _is_whole(self, box: Box, axis: int) -> bool:
        """Whether a box has all indices of an axis of its parameter, and of the axis of its tensor."""
        on_disk = box.axes[axis]
        return on_disk is not None and (
            len(box.memory[axis]) == self.layout.parameters[box.parameter][axis]
            and len(box.stored[on_disk]) == self.layout.tensors[box.tensor][on_disk]
        )

    def _expert(self, box: Box, role: RoleFound) -> tuple[int | None, bool]:
        """The index of the expert if the tensor holds one expert of a stack, and whether it holds all of them."""
        axis = role.expert_axis
        if axis is None:
            return None, False
        if box.axes[axis] is None:
            return box.memory[axis].start, False
        if box.axes[axis] != 0 or not self._is_whole(box, axis):
            raise UnmappedError(f"{box.tensor} does not hold the experts of {box.parameter} along its first axis")
        return None, True

    def _rows(self, box: Box, orientation: _Orientation, role: RoleFound) -> tuple[range | None, range | None]:
        """The rows of the parameter and of the tensor that the box has; None for all."""
        out, in_ = orientation.out, orientation.in_
        if out is None or in_ is None:
            return None, None
        if not self._is_whole(box, in_):
            raise UnmappedError(f"{box.tensor} and {box.parameter} have only a part of their inputs in common")
        rows, stored = box.memory[out], box.stored[box.axes[out] or 0]
        all_rows = range(self.layout.parameters[box.parameter][out])
        all_stored = range(self.layout.tensors[box.tensor][box.axes[out] or 0])
        return (None if rows == all_rows else rows), (None if stored == all_stored else stored)

    def _stream_at(self, box: Box, role: RoleFound) -> tuple[int, ...]:
        scaled = [start * self.d_model for start in role.stream_at]
        if any(start % self.learned.d_model for start in scaled):
            raise UnmappedError(f"where {box.parameter} reads the residual stream does not scale with its width")
        return tuple(start // self.learned.d_model for start in scaled)

    def _layer(self, counterpart: Counterpart, role: RoleFound) -> int | None:
        if counterpart.block is not None:
            return self.numbers[counterpart.block]
        if role.block is None:
            return None
        return self.layout.counterparts.first_like(self.learned.blocks[role.block])

    def _norm(self, norm: NormFound, counterpart: Counterpart) -> Norm:
        gain = None if norm.gain is None else self._vector(counterpart.renamed(norm.gain))
        bias = None if norm.bias is None else self._vector(counterpart.renamed(norm.bias))
        module = counterpart.renamed(norm.module) if norm.module else ""
        parameter = "weight" if norm.gain is None else counterpart.renamed(norm.gain).removeprefix(f"{module}.")
        return Norm(gain, bias, norm.offset, norm.centred, module, norm.column, parameter)

    def _vector(self, parameter: str) -> str:
        """The tensor that holds a parameter and nothing else."""
        found = self.layout.boxes.get(parameter, [])
        if len(found) != 1 or found[0].count != math.prod(self.layout.tensors[found[0].tensor]):
            raise UnmappedError(f"{parameter} is not one tensor of the checkpoint")
        return found[0].tensor

    def _bias(self, bias: str, box: Box, orientation: _Orientation, expert: int | None, experts: bool) -> str:
        """The tensor that holds the bias of a box's rows."""
        rows = None if orientation.out is None else box.memory[orientation.out]
        found = []
        for part in self.layout.boxes.get(bias, ()):
            same_expert = expert is None or (expert in part.memory[0] and len(part.memory[0]) == 1)
            if same_expert and (rows is None or part.memory[-1] == rows):
                found.append(part.tensor)
        if len(found) != 1:
            raise UnmappedError(f"the bias of {box.tensor} is not one tensor of the checkpoint")
        return found[0]

    def _stored_tied_head(self) -> Matrix | None:
        """The unembedding that is stored although the model ties it to the embedding."""
        name = self.layout.head
        if name is None or name in self.layout.parameters or not self.layout.targets.get(name):
            return None
        tensor = self.layout.targets[name][0]
        used = {box.tensor for found in self.layout.boxes.values() for box in found}
        if tensor in used:
            return None
        shape = tuple(self.layout.spelling.names[name].shape)
        if self.layout.tensors[tensor] != shape:
            raise mismatch(tensor, self.layout.tensors[tensor], name, shape)
        roles = [role for role in self.learned.roles if not role.writes and role.role is Role.UNEMBEDDING]
        norms = roles[0].norms if roles else ()
        here = Counterpart(name, name)
        return Matrix(
            tensor,
            Role.UNEMBEDDING,
            None,
            shape,
            (Place(name.rpartition(".")[0], name.rpartition(".")[2]),),
            writes=False,
            reads=self._norm(norms[0], here) if norms else None,
        )


def _role_of_rows(role: RoleFound, twin_rows: range) -> Role | None:
    """What a part of a parameter's rows is for: the role of most of the twin's rows in it that were examined."""
    inside = Counter(word for row, word in role.rows if row in twin_rows)
    return next((word for word, count in inside.items() if count >= _MOST * inside.total()), None)


@dataclass(frozen=True)
class _Orientation:
    """The axes of a parameter that are out and in, None for a vector; and whether out is the last one."""

    out: int | None
    in_: int | None
    transposed: bool
    stored_transposed: bool

"""Try an edit plan on a loaded model: inside a block it computes what the edited weights would compute.

An edit takes the cheapest of three forms that is exact for it:

- A module that computes ``W x + b`` gets a hook that applies the factors to its output. The norm rule scales a writer's
  input before the matrix, or a reader's output (without its bias) after it.
- A stack of experts that are all edited alike, without a norm rule, gets one projection of the experts' common input
  or summed output.
- Every other parameter is exchanged for an edited copy (``copies.py``): routed tokens have no low-rank form for a stack
  whose experts have factors of their own, and a hook does not see a parameter that other code reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ollama_forge.architectures.model_map import Matrix, ModelMap, Place
from ollama_forge.edits.copies import EditedCopies, Part, exchange_copies
from ollama_forge.edits.factors import EditedMatrix, RemoveFromInput, RemoveFromOutput, Rescale, edit_matrix
from ollama_forge.edits.plan import BiasEdit, EditPlan, MatrixEdit
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.matrices import as_slice, bias_of, parameter_of, weight_of

Parts = dict[str, list[Part]]


@contextmanager
def hooked(model: ChatModel, plan: EditPlan) -> Iterator[ChatModel]:
    """Inside the block the model, with its copies, computes as edited by ``plan``; afterwards all is as before."""
    stacks = expert_stacks(model.model_map)
    with ExitStack() as stack:
        if model.copies is not None:
            stack.callback(setattr, model, "copies", model.copies)
            model.copies = model.copies.edited(partial(hooked, plan=plan))
        copied: list[EditedCopies] = []
        originals: dict[nn.Parameter, Tensor] = {}
        exchanged: set[nn.Parameter] = set()
        for path, parts in _by_module(on_devices(model, plan)).items():
            for side in ([p for p in parts if p.edit.matrix.writes is writes] for writes in (True, False)):
                if is_one_projection(model, side, stacks.get(path, [])):
                    stack.callback(_projection_hook(model, side[0]).remove)
                    continue
                for group in _by_parameter(side):
                    if parameter_of(model, group[0].place) in exchanged:
                        continue  # a tied head: the copy of the embedding is edited already
                    if _takes_hooks(group):
                        for handle in _hooks(model, group):
                            stack.callback(handle.remove)
                    else:
                        copied.append(EditedCopies(model, group, originals))
                        exchanged.update(copied[-1].parameters)
        exchange_copies(model, copied, model.memory_available, stack)
        yield model


def _by_module(plan: EditPlan) -> Parts:
    """The places of all edits by the path of their module."""
    parts: Parts = {}
    for edit in plan.edits.values():
        for place in edit.matrix.places if edit.strength else ():  # strength 0 changes nothing
            parts.setdefault(place.module, []).append(Part(edit, place))
    return parts


def _by_parameter(parts: Sequence[Part]) -> list[list[Part]]:
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.place.parameter, []).append(part)
    return list(groups.values())


# -- linear modules and embeddings --------------------------------------------------------------------------------


def _takes_hooks(parts: Sequence[Part]) -> bool:
    """Whether hooks on the module are equivalent to the edits of its parameter.

    A hook that scales the input is equivalent only if a single matrix fills the module. A looked-up row is known to be
    a row of the matrix only if the matrix is the whole embedding.
    """
    if not all(part.place.linear and not part.of_stack and len(part.edit.matrix.shape) > 1 for part in parts):
        return False
    fills = len(parts) == 1 and parts[0].place.rows is None
    return fills or not any(part.edit.rescale is Rescale.COLUMNS or part.edit.matrix.rows_are_written for part in parts)


def _hooks(model: ChatModel, parts: Sequence[Part]) -> list[RemovableHandle]:
    first = parts[0]
    module = model.submodule(first.place)
    results = [
        edit_matrix(weight_of(model, p.edit.matrix), p.edit.rule, p.edit.strength, p.edit.rescale) for p in parts
    ]
    if first.edit.matrix.rows_are_written:
        handles = [module.register_forward_hook(_EmbeddingHook(results[0], first.edit.strength))]
        head = model.head
        if model.model_map.tied and head is not None and head.weight is module.weight:
            block = _Block.of(first, results[0], getattr(head, "bias", None), None)
            handles.append(head.register_forward_hook(_LinearHook([block])))
        return handles
    blocks = []
    for part, result in zip(parts, results, strict=True):
        bias, shift = (None if part.place.bias is None else bias_of(model, part.edit.matrix)), None
        if bias is not None and part.edit.bias_edit is not None:
            shift = part.edit.bias_edit.shift(bias, result, part.edit.strength)
        blocks.append(_Block.of(part, result, bias, shift))
    handles = [module.register_forward_hook(_LinearHook(blocks))]
    if first.edit.rescale is Rescale.COLUMNS:
        handles.append(module.register_forward_pre_hook(_InputScale(results[0])))
    return handles


@dataclass(frozen=True)
class _Block:
    """The edit of the rows ``rows`` of a linear module.

    Attributes:
        left, right: the factors, ``[rows, k]`` and ``[in, k]``.
        row_scale, bias, shift: the norm rule's factor, the bias and its shift, each ``[rows]``; None without.
    """

    rows: slice
    left: Tensor
    right: Tensor
    strength: float
    row_scale: Tensor | None
    bias: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, part: Part, result: EditedMatrix, bias: Tensor | None, shift: Tensor | None) -> _Block:
        """The block of a part of an edited matrix, whose ``bias`` and ``shift`` are given for all rows."""
        edit, here = part.edit, as_slice(part.place.stored_rows)
        scale = result.scale if edit.rescale is Rescale.ROWS else None
        rows = [None if values is None else values[here] for values in (scale, bias, shift)]
        factors = result.factors
        return cls(as_slice(part.place.rows), factors.L[here], factors.K, edit.strength, *rows)

    def edit(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The rows' output ``[..., rows]`` after the edit, from the module's float32 input and these rows' output."""
        changed = output - self.strength * ((inputs @ self.right) @ self.left.T)
        if self.row_scale is not None:
            bias = 0.0 if self.bias is None else self.bias.float()
            changed = (changed - bias) * self.row_scale + bias
        return changed if self.shift is None else changed + self.shift


class _LinearHook:
    """Turns the output ``y = W x + b`` into that of the edited matrices and biases, in the type of ``y``."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self.blocks = blocks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs, changed = args[0].float(), output.to(torch.float32, copy=True)
        for block in self.blocks:
            changed[..., block.rows] = block.edit(inputs, changed[..., block.rows])
        return changed.to(output.dtype)


class _InputScale:
    """Scales the input of a writer by the norm rule's factors of its columns."""

    def __init__(self, result: EditedMatrix) -> None:
        assert result.scale is not None
        self.scale = result.scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0].float() * self.scale).to(args[0].dtype), *args[1:])


class _EmbeddingHook:
    """Edits the looked-up rows of an embedding; a scale that the module applies to them commutes with the edit."""

    def __init__(self, result: EditedMatrix, strength: float) -> None:
        self.basis, self.scale, self.strength = result.factors.K, result.scale, strength

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values = output.float()
        values = values - self.strength * (values @ self.basis) @ self.basis.T
        if self.scale is not None:
            values = values * self.scale[args[0]].unsqueeze(-1)
        return values.to(output.dtype)


# -- stacks of experts --------------------------------------------------------------------------------------------


def expert_stacks(model: ModelMap) -> dict[str, list[tuple[Matrix, Place]]]:
    """The matrices in each module that holds stacks of experts, and no other matrix in it or below it."""
    inside: dict[str, list[tuple[Matrix, Place]]] = {}
    for matrix in model.matrices:
        for place in matrix.places:
            inside.setdefault(place.module, []).append((matrix, place))
    names = [path.split(".") for path in inside]
    above = {".".join(path[:length]) for path in names for length in range(len(path))}
    return {
        path: found
        for path, found in inside.items()
        if path not in above and all(matrix.experts or place.expert is not None for matrix, place in found)
    }


def is_one_projection(model: ChatModel, side: Sequence[Part], stacked: Sequence[tuple[Matrix, Place]]) -> bool:
    """Whether one projection of the experts' input or summed output is equivalent to all edits of a side of a module.

    That takes the same directions and strength for all matrices that the module reads (or writes) with, and no norm
    rule. Writers: with ``W' = W - s V V^T W`` and ``b' = b - s V V^T b`` the sum ``o = sum_e g_e (W_e x_e + b_e)``
    becomes ``o - s V V^T o``, provided that no norm of the module comes between. Readers: with ``W' = W - s W U U^T``
    each expert computes ``W x'`` of ``x' = x - s U U^T x``.

    Args:
        side: the edited readers, or the edited writers, of one module.
        stacked: what the module holds (see ``expert_stacks``).
    """
    if not side or type(model.submodule(side[0].place)).forward is nn.Module.forward:
        return False
    first = side[0].edit
    same_side = [matrix.tensor for matrix, _ in stacked if matrix.writes is first.matrix.writes]
    return sorted(same_side) == sorted(part.edit.matrix.tensor for part in side) and all(
        _is_projection(part) and _alike(part.edit, first) for part in side
    )


def _is_projection(part: Part) -> bool:
    """Whether the edit of one expert's matrix (of a stack) is a projection of its input or output alone."""
    edit, bias = part.edit, part.edit.bias_edit
    if edit.rescale is not Rescale.NONE:
        return False
    if isinstance(edit.rule, RemoveFromInput):
        return bias is None
    behind = [norm.module for norm in edit.matrix.post_norms]
    if part.place.rows is not None or any(f"{path}.".startswith(f"{part.place.module}.") for path in behind):
        return False
    if not isinstance(edit.rule, RemoveFromOutput):
        return False
    if bias is None:
        return part.place.bias is None
    return isinstance(bias, BiasEdit) and bias.norm_bias is None and torch.equal(bias.basis, edit.rule.basis)


def _alike(edit: MatrixEdit, other: MatrixEdit) -> bool:
    assert isinstance(edit.rule, (RemoveFromOutput, RemoveFromInput))
    return (
        type(edit.rule) is type(other.rule)
        and edit.strength == other.strength
        and torch.equal(edit.rule.basis, other.rule.basis)
    )


def _projection_hook(model: ChatModel, part: Part) -> RemovableHandle:
    """The projection that is equivalent to the edit of all experts (see ``is_one_projection``)."""
    assert isinstance(part.edit.rule, (RemoveFromOutput, RemoveFromInput))
    basis, strength = part.edit.rule.basis, part.edit.strength

    def projected(values: Tensor) -> Tensor:
        wide = values.float()
        return (wide - strength * (wide @ basis) @ basis.T).to(values.dtype)

    module = model.submodule(part.place)
    if part.edit.matrix.writes:
        return module.register_forward_hook(lambda module, args, output: projected(output))
    return module.register_forward_pre_hook(lambda module, args: (projected(args[0]), *args[1:]))


def on_devices(model: ChatModel, plan: EditPlan) -> EditPlan:
    """The plan with the tensors of each edit on the device that holds its matrix."""

    def moved(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if is_dataclass(value) and not isinstance(value, (type, Matrix)):
            return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
        return value

    def own(edit: MatrixEdit) -> torch.device:
        return model.device_of(model.submodule(edit.matrix.places[0]))

    return replace(plan, edits={name: moved(edit, own(edit)) for name, edit in plan.edits.items()})

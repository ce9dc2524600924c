"""An edit plan put on a loaded model as hooks, exactly as the weights will be, and taken off again without a trace.

A norm rule is a scaling of a writer's input columns beforehand, or of a reader's output rows (less its bias) after.
Stacked experts have no low-rank form over routed tokens: their parameter is edited while the layer runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.edits.factors import EditedMatrix, Rescale, edit_matrix
from ollama_forge.edits.plan import EditPlan, MatrixEdit
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel


@contextmanager
def hooked(model: ChatModel, plan: EditPlan) -> Iterator[ChatModel]:
    """The model as ``plan`` would make it, inside the block."""
    with ExitStack() as stack:
        for edit in to_device(plan, model.device).edits.values():
            for handle in _hooks(model, edit):
                stack.callback(handle.remove)
        yield model


def weight_of(model: ChatModel, matrix: Matrix) -> Tensor:
    """A loaded matrix as float32 ``[out, in]``."""
    parameter: Tensor = model.submodule(matrix).get_parameter("weight")
    if not parameter.is_floating_point():
        raise ForgeError("edits cannot be tried on a model in 8 bits", "it is loaded again in bf16 for that")
    weight = parameter.detach().float()
    return torch.t(weight) if matrix.transposed else weight


def _hooks(model: ChatModel, edit: MatrixEdit) -> list[RemovableHandle]:
    matrix = edit.matrix
    if matrix.experts:
        return _expert_hooks(model, edit)
    result = edit_matrix(weight_of(model, matrix), edit.rule, edit.strength, edit.rescale)
    module = model.submodule(matrix)
    if matrix.role is Role.EMBEDDING:
        handles = [module.register_forward_hook(_EmbeddingHook(result, edit.strength))]
        head = model.head
        if model.model_map.tied and head is not None and head.weight is module.weight:
            handles.append(head.register_forward_hook(_LinearHook(result, edit, None, None)))
        return handles
    bias = getattr(module, "bias", None)
    shift = None
    if bias is not None and edit.bias_edit is not None:
        shift = edit.bias_edit.shift(bias.detach().float(), result, edit.strength)
    hook = _LinearHook(result, edit, bias, shift)
    handles = [module.register_forward_hook(hook)]
    if edit.rescale is Rescale.COLUMNS:
        handles.append(module.register_forward_pre_hook(hook.scale_input))
    return handles


class _LinearHook:
    """``y = W x + b`` -> ``y'`` of the edited matrix and bias, in the output's type."""

    def __init__(self, result: EditedMatrix, edit: MatrixEdit, bias: Tensor | None, shift: Tensor | None) -> None:
        self.left, self.right = result.factors.L, result.factors.K
        self.strength, self.rescale, self.scale = edit.strength, edit.rescale, result.scale
        self.bias, self.shift = bias, shift

    def scale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.scale is not None
        return ((args[0].float() * self.scale).to(args[0].dtype), *args[1:])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        removed = (args[0].float() @ self.right) @ self.left.T
        changed: Tensor = output.float() - self.strength * removed
        if self.rescale is Rescale.ROWS:
            assert self.scale is not None
            bias = 0.0 if self.bias is None else self.bias.float()
            changed = (changed - bias) * self.scale + bias
        if self.shift is not None:
            changed = changed + self.shift
        return changed.to(output.dtype)


class _EmbeddingHook:
    """Each row looked up becomes the edited one; a scale that the module applies commutes with that."""

    def __init__(self, result: EditedMatrix, strength: float) -> None:
        self.basis, self.scale, self.strength = result.factors.K, result.scale, strength

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values = output.float()
        values = values - self.strength * (values @ self.basis) @ self.basis.T
        if self.scale is not None:
            values = values * self.scale[args[0]].unsqueeze(-1)
        return values.to(output.dtype)


@dataclass
class _ExpertPatch:
    """Edits a stacked parameter (and its bias) while its module runs."""

    edit: MatrixEdit
    name: str
    saved: list[tuple[nn.Parameter, Tensor]]

    def put_on(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        parameter: nn.Parameter = getattr(module, self.name)
        bias: nn.Parameter | None = getattr(module, f"{self.name}_bias", None)
        original = parameter.data
        changed = original.clone()
        shifted = None if bias is None else bias.data.clone()
        for expert in range(len(original)):
            weight = original[expert].float()
            weight = weight.T if self.edit.matrix.transposed else weight
            result = edit_matrix(weight, self.edit.rule, self.edit.strength, self.edit.rescale, expert)
            changed[expert].copy_(result.weight.T if self.edit.matrix.transposed else result.weight)
            if bias is not None and shifted is not None and self.edit.bias_edit is not None:
                row = bias.data[expert].float()
                shift = self.edit.bias_edit.shift(row, result, self.edit.strength, expert)
                shifted[expert].copy_(row + shift)
        self.saved.append((parameter, original))
        parameter.data = changed
        if bias is not None and shifted is not None:
            self.saved.append((bias, bias.data))
            bias.data = shifted

    def take_off(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self.saved:
            parameter, original = self.saved.pop()
            parameter.data = original


def _expert_hooks(model: ChatModel, edit: MatrixEdit) -> list[RemovableHandle]:
    module = model.submodule(edit.matrix)
    patch = _ExpertPatch(edit, edit.matrix.module.rsplit(".", 1)[1], [])
    return [
        module.register_forward_pre_hook(patch.put_on),
        module.register_forward_hook(patch.take_off, always_call=True),
    ]


def to_device(plan: EditPlan, device: torch.device) -> EditPlan:
    """The plan with its tensors on a device, so that hooks compute there."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if is_dataclass(value) and not isinstance(value, (type, Matrix)):
            return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
        return value

    return replace(plan, edits={name: moved(edit) for name, edit in plan.edits.items()})

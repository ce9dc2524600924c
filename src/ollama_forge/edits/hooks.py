"""Try an edit plan on a loaded model with hooks that compute what the edited weights would compute.

The norm rule scales a writer's input before the matrix, or a reader's output (without its bias) after it. Routed tokens
have no low-rank form for stacked experts. Without a norm rule, one projection of the experts' common input or summed
output is equivalent; with one, the stacked parameter is exchanged for an edited copy inside the block. The copies take
as much memory as the edited stacks (gpt-oss-20b in bf16, per layer: ``down`` 0.53 GB, ``gate_up`` 1.06 GB).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.edits.factors import EditedMatrix, RemoveFromInput, RemoveFromOutput, Rescale, edit_matrix
from ollama_forge.edits.plan import BiasEdit, EditPlan, FixedBiasShift, MatrixEdit
from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.device import memory_available
from ollama_forge.progress import say

_SHARE_OF_FREE_MEMORY = 0.75


@contextmanager
def hooked(model: ChatModel, plan: EditPlan) -> Iterator[ChatModel]:
    """Inside the block the model computes as edited by ``plan``; afterwards its weights and hooks are as before."""
    edits = list(to_device(plan, model.device).edits.values())
    with ExitStack() as stack:
        copied: list[_ExpertCopies] = []
        for edit in edits:
            if edit.matrix.experts and not _is_one_projection(model, edit):
                copied.append(_ExpertCopies(model.submodule(edit.matrix.place), edit))
                continue
            for handle in _projection_hooks(model, edit) if edit.matrix.experts else _hooks(model, edit):
                stack.callback(handle.remove)
        _exchange_experts(copied, memory_available(model.device), stack)
        yield model


def weight_of(model: ChatModel, matrix: Matrix) -> Tensor:
    """A matrix of a loaded model as float32 ``[out, in]``.

    Raises:
        ForgeError: the model was loaded in 8 bits.
    """
    parameter: Tensor = model.submodule(matrix.place).get_parameter(matrix.place.parameter)
    if not parameter.is_floating_point():
        raise ForgeError("a model loaded in 8 bits cannot be edited", "leave out --load-in-8bit")
    weight = parameter.detach().float()
    return torch.t(weight) if matrix.place.transposed else weight


def _hooks(model: ChatModel, edit: MatrixEdit) -> list[RemovableHandle]:
    matrix = edit.matrix
    result = edit_matrix(weight_of(model, matrix), edit.rule, edit.strength, edit.rescale)
    module = model.submodule(matrix.place)
    if matrix.rows_are_written:
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
    """Turns the output ``y = W x + b`` into that of the edited matrix and bias, in the type of ``y``."""

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
    """Edits the looked-up rows of an embedding; a scale that the module applies to them commutes with the edit."""

    def __init__(self, result: EditedMatrix, strength: float) -> None:
        self.basis, self.scale, self.strength = result.factors.K, result.scale, strength

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values = output.float()
        values = values - self.strength * (values @ self.basis) @ self.basis.T
        if self.scale is not None:
            values = values * self.scale[args[0]].unsqueeze(-1)
        return values.to(output.dtype)


def _is_one_projection(model: ChatModel, edit: MatrixEdit) -> bool:
    """Whether one projection of the experts' input or summed output is equivalent to editing each expert of a stack.

    That takes the same directions for all experts, and no norm rule. Writers: with ``W' = W - s V V^T W`` and
    ``b' = b - s V V^T b`` the sum ``o = sum_e g_e (W_e x_e + b_e)`` becomes ``o - s V V^T o``. Readers: with
    ``W' = W - s W U U^T`` and ``b' = b + s W U U^T beta`` each expert computes ``W x' + b`` of
    ``x' = x - s U U^T (x - beta)``, provided that no other matrix of the module reads ``x``.
    """
    bias = edit.bias_edit
    if edit.rescale is not Rescale.NONE or isinstance(bias, FixedBiasShift):
        return False
    if isinstance(edit.rule, RemoveFromOutput):
        return torch.equal(bias.basis, edit.rule.basis) if bias is not None else edit.matrix.bias is None
    module = model.submodule(edit.matrix.place)
    stacks = [m for m in model.model_map.matrices if m.experts and m.layer == edit.matrix.layer and not m.writes]
    return isinstance(edit.rule, RemoveFromInput) and [model.submodule(m.place) for m in stacks].count(module) == 1


def _projection_hooks(model: ChatModel, edit: MatrixEdit) -> list[RemovableHandle]:
    """The projection that is equivalent to the edit of all experts (see ``_is_one_projection``)."""
    assert isinstance(edit.rule, (RemoveFromOutput, RemoveFromInput))
    basis, strength = edit.rule.basis, edit.strength
    norm_bias = edit.bias_edit.norm_bias if isinstance(edit.bias_edit, BiasEdit) else None

    def projected(values: Tensor) -> Tensor:
        wide = values.float()
        along = wide if norm_bias is None else wide - norm_bias
        return (wide - strength * (along @ basis) @ basis.T).to(values.dtype)

    module = model.submodule(edit.matrix.place)
    if edit.matrix.writes:
        return [module.register_forward_hook(lambda module, args, output: projected(output))]
    return [module.register_forward_pre_hook(lambda module, args: (projected(args[0]), *args[1:]))]


class _ExpertCopies:
    """Exchanges a stacked parameter of a module (and its bias, if it is edited) for edited copies, and restores it."""

    def __init__(self, module: nn.Module, edit: MatrixEdit) -> None:
        self.module, self.edit = module, edit
        place = edit.matrix.place
        self.weight = module.get_parameter(place.parameter)
        edits_bias = edit.bias_edit is not None and place.bias is not None
        self.bias: nn.Parameter | None = module.get_parameter(place.bias) if edits_bias and place.bias else None
        self.originals: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def size(self) -> int:
        """Bytes of the edited copies."""
        return sum(p.nbytes for p in (self.weight, self.bias) if p is not None)

    @torch.no_grad()
    def exchange(self, *_: Any) -> None:
        edit, transposed = self.edit, self.edit.matrix.place.transposed
        weights = torch.empty_like(self.weight)
        biases = None if self.bias is None else torch.empty_like(self.bias)
        for expert, original in enumerate(self.weight.data):
            weight = original.float().T if transposed else original.float()
            result = edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert)
            weights[expert].copy_(result.weight.T if transposed else result.weight)
            if self.bias is not None and biases is not None and edit.bias_edit is not None:
                bias = self.bias.data[expert].float()
                biases[expert].copy_(bias + edit.bias_edit.shift(bias, result, edit.strength, expert))
        for parameter, copy in ((self.weight, weights), (self.bias, biases)):
            if parameter is not None and copy is not None:
                self.originals.append((parameter, parameter.data))
                parameter.data = copy

    def restore(self, *_: Any) -> None:
        while self.originals:
            parameter, original = self.originals.pop()
            parameter.data = original


def _exchange_experts(copied: list[_ExpertCopies], free: int | None, stack: ExitStack) -> None:
    """Exchange stacks of experts for edited copies until ``stack`` closes.

    A stack whose copy does not fit into memory is edited at every forward pass, and only while its module runs.

    Args:
        free: bytes free on the device; None if unknown. Copies take at most three quarters of it, the rest is left for
            activations.
    """
    sizes = [copies.size for copies in copied]
    budget = math.inf if free is None else _SHARE_OF_FREE_MEMORY * free
    if sum(sizes) > budget:
        budget -= max(sizes)  # reserved for a stack that is edited while its module runs
    per_forward = 0
    for copies, size in zip(copied, sizes, strict=True):
        if size <= budget:
            budget -= size
            stack.callback(copies.restore)
            copies.exchange()
        else:
            per_forward += 1
            stack.callback(copies.module.register_forward_pre_hook(copies.exchange).remove)
            stack.callback(copies.module.register_forward_hook(copies.restore, always_call=True).remove)
    if per_forward:
        say(
            f"note: edited copies of the experts need {human_size(sum(sizes))}, but {human_size(free or 0)} are free: "
            f"{per_forward} of {len(copied)} stacks are edited at every forward pass, which is slow"
        )


def to_device(plan: EditPlan, device: torch.device) -> EditPlan:
    """The plan with its tensors moved to a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if is_dataclass(value) and not isinstance(value, (type, Matrix)):
            return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
        return value

    return replace(plan, edits={name: moved(edit) for name, edit in plan.edits.items()})

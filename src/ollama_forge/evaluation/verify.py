"""Proof, on the written checkpoint, that the edit is in the weights: exactly as planned, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.architectures.read_matrix import experts_of, read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import FLOAT_TYPES, decode_tensor, encode_tensor
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import RemoveFromInput, edit_matrix
from ollama_forge.edits.plan import EditPlan, MatrixEdit
from ollama_forge.models.chat_model import ChatModel

SENTENCE = "The harbour was quiet in the morning, and the first boats came back with the tide."
WRITER_BOUND = 1e-3
READER_BOUND = 1e-2
FACTOR_BOUND = 1e-2
_DRAWN_INPUTS = 16


@dataclass(frozen=True)
class Check:
    """One statement about the checkpoint: its worst value, the bound on it, and where that was."""

    name: str
    passed: bool
    worst: float | None
    bound: float | None
    where: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Worst:
    """Keeps the largest value and its place."""

    value: float = 0.0
    where: str = ""
    seen: int = 0

    def see(self, value: float, where: str) -> None:
        self.seen += 1
        if not value <= self.value:
            self.value, self.where = value, where

    def check(self, name: str, bound: float) -> Check:
        return Check(name, self.value <= bound, self.value, bound, self.where)


def verify(
    source: Checkpoint,
    written: Checkpoint,
    model: ChatModel,
    plan: EditPlan,
    direction: RefusalDirection | None,
) -> list[Check]:
    """Check a written checkpoint against its source and plan.

    Args:
        model: the written checkpoint, loaded.
        direction: what the plan removes; None for factors that were given.
    """
    checks = [_loss(model)]
    full = {n: e for n, e in plan.edits.items() if plan.projects and e.strength == 1.0}
    if full and direction is not None:
        writers = [edit.matrix for edit in full.values() if edit.matrix.writes and edit.matrix.layer is not None]
        if writers:
            checks.append(_contributions(model, writers, direction))
        readers = [edit for edit in full.values() if isinstance(edit.rule, RemoveFromInput)]
        if readers:
            checks.append(_reader_residue(source, written, readers))
    others = [edit for name, edit in plan.edits.items() if name not in full]
    if others:
        checks.append(_factors_on_inputs(source, written, model, others))
    checks.append(_changed_tensors(source, written, plan))
    return checks


def _loss(model: ChatModel) -> Check:
    loss = model.loss(SENTENCE)
    return Check("finite loss on a sentence", math.isfinite(loss), loss, None, "")


@contextmanager
def _hooked(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: ChatModel) -> None:
    for batch in model.batches([model.tokenizer.instruction_ids(SENTENCE)]):
        model.run_to_layer(batch, model.model_map.n_layers - 1)


def _contributions(model: ChatModel, writers: list[Matrix], direction: RefusalDirection) -> Check:
    """``|r.out| / |out|`` of what each writer adds to the residual stream, its post-norm included."""
    worst = _Worst()
    handles = []
    for matrix in writers:
        handles.append(_adder(model, matrix).register_forward_hook(_contribution(worst, matrix, direction)))
    with _hooked(handles):
        _run(model)
    return worst.check("writers add nothing along the direction", WRITER_BOUND)


def _adder(model: ChatModel, matrix: Matrix) -> nn.Module:
    """The module whose output is added to the stream: the writer, or the norm behind it."""
    if matrix.post_norm is None:
        return model.submodule(matrix)
    assert matrix.layer is not None
    name = matrix.post_norm.weight.removesuffix(".weight").rsplit(".", 1)[1]
    return model.layer(matrix.layer).get_submodule(name)


def _contribution(worst: _Worst, matrix: Matrix, direction: RefusalDirection) -> Any:
    vectors = direction.for_layer(matrix.layer or 0)

    def see(module: nn.Module, args: Any, output: Any) -> None:
        added: Tensor = (output[0] if isinstance(output, tuple) else output).float().flatten(0, -2)
        along = torch.linalg.vector_norm(added @ vectors.T.to(added.device), dim=-1)
        size = torch.linalg.vector_norm(added, dim=-1).clamp_min(1e-30)
        worst.see(float((along / size).max()), matrix.tensor)

    return see


def _reader_residue(source: Checkpoint, written: Checkpoint, readers: list[MatrixEdit]) -> Check:
    """``|W'u| / |Wu|`` of each reader (and the embedding), its worst direction."""
    worst = _Worst()
    for edit in readers:
        assert isinstance(edit.rule, RemoveFromInput)
        for expert in experts_of(edit.matrix):
            before = read_matrix(source.tensors, edit.matrix, expert)[0] @ edit.rule.basis
            after = read_matrix(written.tensors, edit.matrix, expert)[0] @ edit.rule.basis
            worst.see(
                float(torch.linalg.norm(after) / torch.linalg.norm(before).clamp_min(1e-30)),
                edit.matrix.tensor,
            )
    return worst.check("readers are blind to the direction", READER_BOUND)


def _factors_on_inputs(source: Checkpoint, written: Checkpoint, model: ChatModel, edits: list[MatrixEdit]) -> Check:
    """``W'x`` against ``Wx - s L K^T x`` (rescaled by the norm rule) on real inputs ``x``.

    An expert's inputs are routed inside its module and an embedding's are ids: theirs are seeded random vectors.
    """
    inputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: Any) -> None:
            inputs[name] = args[0].detach().float().flatten(0, -2).cpu()

        return keep

    linear = [edit for edit in edits if edit.matrix.role is not Role.EMBEDDING and not edit.matrix.experts]
    handles = [model.submodule(e.matrix).register_forward_pre_hook(keeper(e.matrix.tensor)) for e in linear]
    with _hooked(handles):
        _run(model)
    worst = _Worst()
    for edit in edits:
        matrix = edit.matrix
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(_DRAWN_INPUTS, matrix.in_features, generator=generator)
        x = inputs.get(matrix.tensor, drawn)
        for expert in experts_of(matrix):
            before = read_matrix(source.tensors, matrix, expert)[0]
            wanted = edit_matrix(before, edit.rule, edit.strength, edit.rescale, expert).weight
            expected, found = x @ wanted.T, x @ read_matrix(written.tensors, matrix, expert)[0].T
            error = torch.linalg.norm(found - expected) / torch.linalg.norm(expected).clamp_min(1e-30)
            worst.see(float(error), matrix.tensor)
    return worst.check("edited matrices act as their factors say", FACTOR_BOUND)


def _changed_tensors(source: Checkpoint, written: Checkpoint, plan: EditPlan) -> Check:
    """Tensors that differ (beyond their storage type) are the planned ones, and each planned matrix differs."""
    allowed = plan.changed_tensors
    packed = {edit_name for edit_name in written.tensors if edit_name not in source.tensors}
    wrong = [
        name for name in source.tensors if name not in written.tensors and not name.endswith(("_blocks", "_scales"))
    ]
    for name in written.tensors:
        if name in packed:
            continue  # decoded experts: their values are compared through the readers' and writers' checks
        same = _same(source, written, name)
        forgotten = same and name in plan.edits and _would_change(source, plan.edits[name], written.tensors[name].dtype)
        if forgotten or (not same and name not in allowed):
            wrong.append(name)
    return Check(
        "the changed tensors are the planned ones",
        not wrong,
        float(len(wrong)),
        0.0,
        ", ".join(sorted(wrong)[:4]),
    )


def _would_change(source: Checkpoint, edit: MatrixEdit, dtype: str) -> bool:
    """Whether the edit of a matrix survives the rounding to its storage type (that of a zero matrix doesn't)."""
    for expert in experts_of(edit.matrix):
        weight = read_matrix(source.tensors, edit.matrix, expert)[0]
        result = edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert).weight
        if bytes(encode_tensor(weight, dtype)) != bytes(encode_tensor(result, dtype)):
            return True
    return False


def _same(source: Checkpoint, written: Checkpoint, name: str) -> bool:
    before, after = source.tensors[name], written.tensors[name]
    if before.shape != after.shape:
        return False
    step = 64 << 20
    if before.dtype == after.dtype:
        return all(
            source.tensors.read_bytes(name, start, min(step, before.size - start))
            == written.tensors.read_bytes(name, start, min(step, before.size - start))
            for start in range(0, before.size, step)
        )
    if before.dtype not in FLOAT_TYPES or after.dtype not in FLOAT_TYPES:
        return False
    widths = before.size // max(before.count, 1), after.size // max(after.count, 1)
    for start in range(0, before.count, step):
        count = min(step, before.count - start)
        values = decode_tensor(
            source.tensors.read_bytes(name, start * widths[0], count * widths[0]), before.dtype, (count,)
        )
        if bytes(encode_tensor(values, after.dtype)) != bytes(
            written.tensors.read_bytes(name, start * widths[1], count * widths[1])
        ):
            return False
    return True

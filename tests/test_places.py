"""Hooks compute what the written weights compute, wherever the matrices of a checkpoint lie in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.read_matrix import experts_of, read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import hooks
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.factors import FixedFactors, Rescale, edit_matrix
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, MatrixEdit, ReadVector, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.cpu_packing import pack_linears
from ollama_forge.models.matrices import bias_of, weight_of
from tests import moe, odd, tiny
from tests.first_tokens import first_log_probs

ALL = EditSettings(targets=("attention", "mlp", "embedding"), strength=0.7, skip_begin_layers=0, skip_end_layers=0)
FACTORS = "factors of its own for each matrix"
CASES: dict[str, EditSettings] = {
    "norms kept": ALL,
    "no norm rule": replace(ALL, norm_preserving=False),
    "writers of some layers": replace(ALL, targets=("writers",), skip_begin_layers=1, skip_end_layers=1),
}


def fixed(matrices: Iterable[Matrix], *, readers: bool) -> EditPlan:
    """A plan with random factors for each matrix of the layers, or for the writers alone."""
    generator = torch.Generator().manual_seed(3)
    edits = {}
    for matrix in matrices:
        if matrix.layer is None or not (matrix.writes or readers) or matrix.rows_are_written:
            continue
        stack, sizes = matrix.shape[:1] if matrix.experts else (), (matrix.out_features, matrix.in_features)
        left, right = (torch.randn(*stack, size, 2, generator=generator) * 0.2 for size in sizes)
        edits[matrix.tensor] = MatrixEdit(matrix, FixedFactors(left, right), 0.5, Rescale.NONE)
    return EditPlan("fixed", edits, {}, projects=False)


def orthogonal(mapped: ModelMap, case: str, read: ReadVector) -> EditPlan:
    direction = RefusalDirection(tiny.unit_vector(7, mapped.d_model).unsqueeze(0), layer=2)
    return plan_orthogonal(mapped, direction, CASES[case], read)


def planned(source: Checkpoint, mapped: ModelMap, case: str) -> EditPlan:
    if case == FACTORS:
        return fixed(mapped.matrices, readers=False)
    return orthogonal(mapped, case, vector_reader(source.tensors))


@pytest.mark.parametrize("case", [*CASES, FACTORS])
@pytest.mark.parametrize("family", moe.FAMILIES)
def test_hooks_do_what_the_weights_will(family: str, case: str, tmp_path: Path) -> None:
    source, mapped = moe.saved(family, tmp_path / "source")
    plan = planned(source, mapped, case)
    write_checkpoint(source, mapped, plan, tmp_path / "edited", settings=ALL, out_dtype="keep", direction=None)
    base, written = moe.load(source, mapped), moe.load(Checkpoint(tmp_path / "edited", "edited", "folder"), mapped)
    ids = base.tokenizer.instructions_ids(tiny.lines(3))
    plain = first_log_probs(base, ids)
    with hooked(base, plan):
        as_hooks = first_log_probs(base, ids)
    torch.testing.assert_close(as_hooks, first_log_probs(written, ids), rtol=1e-4, atol=2e-4)
    assert (as_hooks - plain).abs().max() > 0.05
    assert torch.equal(first_log_probs(base, ids), plain)


def written_tensors(tensors: dict[str, Tensor], plan: EditPlan) -> dict[str, Tensor]:
    """The checkpoint of the made-up model after the edit."""
    out = dict(tensors)
    for name, edit in plan.edits.items():
        stored = tensors[name]
        result = edit_matrix(stored.reshape(-1, stored.shape[-1]), edit.rule, edit.strength, edit.rescale)
        out[name] = result.weight.reshape(stored.shape)
        if edit.bias_edit is not None:
            assert edit.matrix.bias is not None
            bias = tensors[edit.matrix.bias]
            out[edit.matrix.bias] = bias + edit.bias_edit.shift(bias, result, edit.strength)
    return out


@pytest.mark.parametrize("called", [True, False], ids=["hooks", "copies"])
@pytest.mark.parametrize("case", [*CASES, FACTORS])
@torch.inference_mode()
def test_hooks_follow_a_matrix_that_memory_holds_in_another_form(case: str, called: bool) -> None:
    tensors, mapped = odd.stored_tensors(), odd.model_map()
    if not called:
        places = [tuple(replace(place, linear=False) for place in matrix.places) for matrix in mapped.matrices]
        matrices = [replace(matrix, places=p) for matrix, p in zip(mapped.matrices, places, strict=True)]
        mapped = replace(mapped, matrices=tuple(matrices))
    plan = fixed(mapped.matrices, readers=True) if case == FACTORS else orthogonal(mapped, case, tensors.__getitem__)
    base, written = odd.load(tensors), odd.load(written_tensors(tensors, plan))
    ids = torch.arange(2 * odd.LENGTH).view(2, -1) % odd.VOCABULARY
    plain = base.module(ids).logits
    with hooked(base, plan):
        as_hooks = base.module(ids).logits
    torch.testing.assert_close(as_hooks, written.module(ids).logits, rtol=1e-4, atol=2e-4)
    assert (as_hooks - plain).abs().max() > 0.05
    assert torch.equal(base.module(ids).logits, plain)


def test_a_matrix_is_read_wherever_it_is() -> None:
    tensors = odd.stored_tensors()
    model = odd.load(tensors)
    for matrix in model.model_map.matrices:
        stored = tensors[matrix.tensor]
        assert torch.equal(weight_of(model, matrix), stored.reshape(-1, stored.shape[-1]))
        if matrix.bias is not None:
            assert torch.equal(bias_of(model, matrix), tensors[matrix.bias])


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_experts_are_read_from_their_stack(family: str, tmp_path: Path) -> None:
    source, mapped = moe.saved(family, tmp_path)
    model = moe.load(source, mapped)
    for matrix in mapped.matrices:
        for expert in experts_of(matrix):
            assert torch.equal(weight_of(model, matrix, expert), read_matrix(source.tensors, matrix, expert)[0])


def test_experts_that_are_edited_alike_take_one_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless one of them has another strength, or is left out."""
    source, mapped = moe.saved("mixtral", tmp_path)
    model, plan = moe.load(source, mapped), planned(source, mapped, "no norm rule")
    some = {name for name in plan.edits if "experts.2.w1" in name}
    weaker = {name: replace(edit, strength=0.3) if name in some else edit for name, edit in plan.edits.items()}
    fewer = {name: edit for name, edit in plan.edits.items() if name not in some}
    copied: list[int] = []
    real = hooks.exchange_copies

    def counting(*args: Any) -> None:
        copied.append(len(args[1]))
        real(*args)

    monkeypatch.setattr(hooks, "exchange_copies", counting)
    for edits in (plan.edits, weaker, fewer):
        with hooked(model, replace(plan, edits=edits)):
            pass
    assert copied == [0, moe.LAYERS, moe.LAYERS]


def test_packed_weights_do_not_hide_an_edited_copy(tmp_path: Path) -> None:
    source, mapped = moe.saved("jamba", tmp_path)
    edits = {
        name: replace(edit, matrix=replace(edit.matrix, places=(replace(edit.matrix.place, linear=False),)))
        for name, edit in planned(source, mapped, FACTORS).edits.items()
        if edit.matrix.role is Role.O
    }
    plan = EditPlan("fixed", edits, {}, projects=False)
    plain, packed = (moe.load(source, mapped) for _ in range(2))
    for model in (plain, packed):
        model.module.to(torch.bfloat16)
    pack_linears(packed.module)
    module = packed.submodule(next(iter(edits.values())).matrix.place)
    if "forward" not in vars(module):
        pytest.skip("this processor packs no weights")
    forward, ids = vars(module)["forward"], plain.tokenizer.instructions_ids(tiny.lines(3))
    before = first_log_probs(packed, ids)
    with hooked(plain, plan), hooked(packed, plan):
        wanted, found = (first_log_probs(model, ids) for model in (plain, packed))
    assert (found - wanted).abs().max() < 0.2 * (wanted - before).abs().max()
    assert vars(module)["forward"] is forward
    assert torch.equal(first_log_probs(packed, ids), before)

"""Edits in blocks equal the edit of the whole matrix, and hold at most one block in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollama_forge.api import apply
from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.architectures.read_matrix import read_matrix
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import blocks
from ollama_forge.edits.background_hash import HashThread
from ollama_forge.edits.blocks import BlockwiseEdit
from ollama_forge.edits.checkpoint_folder import edit_file_path
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import (
    FixedFactors,
    RemoveFromInput,
    RemoveFromOutput,
    Rescale,
    Rule,
    edit_matrix,
    squared_norms,
)
from ollama_forge.edits.plan import MatrixEdit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify.edited import adds_to_stream
from tests import tiny

OUT, IN, EXPERTS = 37, 24, 3
SMALL = 60  # values of a block: two or more blocks each way


def eighths(*shape: int) -> Tensor:
    """Values that float32 multiplies and adds without rounding, so that no order of summing changes a bit."""
    return torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(0)).float() / 8


def basis(size: int) -> Tensor:
    """A unit vector ``[size, 1]`` of four halves."""
    vector = torch.zeros(size, 1)
    vector[[1, 4, size - 2, size - 1]] = torch.tensor([[0.5], [-0.5], [0.5], [0.5]])
    return vector


def given(stacked: bool) -> FixedFactors:
    experts = (EXPERTS,) if stacked else ()
    return FixedFactors(eighths(*experts, OUT, 2), eighths(*experts, IN, 2))


CASES = {
    "reader": (lambda stacked: RemoveFromInput(basis(IN)), Rescale.ROWS),
    "reader without norm rule": (lambda stacked: RemoveFromInput(basis(IN)), Rescale.NONE),
    "writer": (lambda stacked: RemoveFromOutput(basis(OUT)), Rescale.COLUMNS),
    "given rows": (given, Rescale.ROWS),
    "given columns": (given, Rescale.COLUMNS),
}  # fmt: skip
LAYOUTS = {"plain": (False, False), "conv1d": (True, False), "experts": (True, True)}


def edit_by_blocks(folder: Path, rule: Rule, rescale: Rescale, layout: str, dtype: str, out: str) -> dict[str, Any]:
    """What comes of each expert: bytes, source hash, factors, scale; and the largest float32 block."""
    transposed, stacked = LAYOUTS[layout]
    shape = (*((EXPERTS,) if stacked else ()), *((IN, OUT) if transposed else (OUT, IN)))
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    save_file({"w": eighths(*shape).to(types[dtype])}, folder / "model.safetensors")
    matrix = Matrix("w", Role.DOWN, 0, shape, "w", True, transposed=transposed, experts=stacked)
    found: dict[str, Any] = {"largest": 0}
    for expert in range(EXPERTS) if stacked else [None]:
        thread = HashThread()
        digest = thread.blake3()
        blockwise = BlockwiseEdit(CheckpointTensors(folder), MatrixEdit(matrix, rule, 0.5, rescale), expert, "model")
        edited = list(blockwise.blocks())
        found["largest"] = max(found["largest"], *(block.before.numel() for block in edited))
        data = b"".join(bytes(piece) for piece in blockwise.stored_bytes(blockwise.blocks(digest), out))
        joined = blockwise.factors()
        tensors = (joined.factors.L, joined.factors.K, torch.ones(1) if joined.scale is None else joined.scale)
        found[str(expert)] = (data, digest.digest(), [tensor.tolist() for tensor in tensors])
    return found


@pytest.mark.parametrize("case", [*CASES, "given without norm rule", "writer whose rows are kept"])
@pytest.mark.parametrize("strength", [1.0, 2.5, -0.7, 1e-3])
@pytest.mark.parametrize("directions", [1, 3])
def test_the_norm_of_the_change_comes_from_the_factors(case: str, strength: float, directions: int) -> None:
    draws = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=draws)
    make, rescale = CASES.get(case, (given, Rescale.NONE))
    if case == "writer whose rows are kept":
        make, rescale = CASES["writer"][0], Rescale.ROWS
    rule: Rule = make(False)
    if isinstance(rule, RemoveFromInput | RemoveFromOutput):
        drawn = torch.randn(len(rule.basis), directions, generator=draws)
        rule = replace(rule, basis=torch.linalg.qr(drawn).Q)
    edited = edit_matrix(weight, rule, strength, rescale)
    change = (edited.weight.double() - weight.double()).square().sum()
    norm, found = squared_norms(weight, edited, rule, strength, rescale)
    assert norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert found**0.5 == pytest.approx(float(change) ** 0.5, rel=1e-3 if abs(strength) < 0.1 else 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "out"), [("BF16", "BF16"), ("F32", "F32"), ("F16", "BF16")])
def test_blocks_give_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, layout: str, dtype: str, out: str
) -> None:
    make, rescale = CASES[case]
    rule = make(LAYOUTS[layout][1])
    whole = edit_by_blocks(tmp_path, rule, rescale, layout, dtype, out)
    monkeypatch.setattr(blocks, "BLOCK", SMALL)
    apart = edit_by_blocks(tmp_path, rule, rescale, layout, dtype, out)
    assert whole.pop("largest") == OUT * IN
    assert apart.pop("largest") <= SMALL
    assert apart == whole


@pytest.mark.parametrize(("family", "targets"), [("llama", ("writers", "embedding")), ("gpt2", ("attention", "mlp"))])
def test_apply_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, targets: tuple[str, ...]
) -> None:
    RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    tiny.save(tiny.build(family), tmp_path / "model")
    records = []
    for name, size in (("whole", blocks.BLOCK), ("apart", 300)):
        monkeypatch.setattr(blocks, "BLOCK", size)
        settings = EditSettings(targets=targets)
        apply(str(tmp_path / "model"), tmp_path / name, refusal_pt=tmp_path / "refusal.pt", settings=settings)
        records.append(EditRecord.load(edit_file_path(tmp_path / name)))
    torch.testing.assert_close(*(load_file(tmp_path / name / "model.safetensors") for name in ("apart", "whole")))
    whole, apart = records
    assert list(apart.matrices) == list(whole.matrices)
    torch.testing.assert_close(dict(apart.bias_shifts), dict(whole.bias_shifts))
    for name, record in whole.matrices.items():
        assert apart.matrices[name].source_hash == record.source_hash
        assert apart.matrices[name].relative_change == pytest.approx(record.relative_change, rel=1e-5)
        torch.testing.assert_close(apart.matrices[name].L, record.L)
        torch.testing.assert_close(apart.matrices[name].K, record.K)


def test_a_vector_of_the_stream_is_a_matrix_of_one_row(tmp_path: Path) -> None:
    vector, r = eighths(IN), basis(IN)
    save_file({"w": vector}, tmp_path / "model.safetensors")
    tensors, matrix = CheckpointTensors(tmp_path), Matrix("w", Role.MIXER, 0, (IN,), (), True)
    assert torch.equal(read_matrix(tensors, matrix)[0], vector.unsqueeze(0))
    blockwise = BlockwiseEdit(tensors, MatrixEdit(matrix, RemoveFromInput(r), 1.0, Rescale.NONE), None, "model")
    (data,) = blockwise.stored_bytes(blockwise.blocks(), "F32")
    edited = torch.frombuffer(bytearray(data), dtype=torch.float32)
    torch.testing.assert_close(edited, vector - (vector @ r[:, 0]) * r[:, 0])
    assert not adds_to_stream(matrix)

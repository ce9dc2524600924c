"""Packed storage formats: bytes to values and back, rounding that keeps an edit, and checkpoints in these forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ollama_forge.api import apply
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.base import PackedMatrix, Region, WritableCodec
from ollama_forge.checkpoints.formats.fp8 import Fp8Codec
from ollama_forge.checkpoints.formats.mxfp4 import Mxfp4Codec
from ollama_forge.checkpoints.formats.rounding import Kept, Minifloat, round_keeping
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import blocks
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.resolve import resolve
from tests import tiny
from tests.packed import BLOCK, FP8, FP8_FORMS, fp8_decoded, fp8_model, mark
from tests.test_apply import packed_gpt_oss

QUICK = settings(max_examples=40, deadline=None)
E4M3 = Minifloat(mantissa=3, smallest_normal=2.0**-6, largest=448.0)
E2M1 = Minifloat(mantissa=1, smallest_normal=1.0, largest=6.0)
R = RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2)
ALL = EditSettings(targets=("attention", "mlp", "embedding"))
Tensors = dict[str, Tensor]


# -- one matrix -----------------------------------------------------------------------------------------------------


def codes_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encoded(matrix: PackedMatrix, values: Tensor, kept: Kept | None = None) -> PackedMatrix:
    codec = matrix.codec
    assert isinstance(codec, WritableCodec)
    region = Region(slice(0, matrix.shape[0]), slice(0, matrix.shape[1]), values)
    result = codec.blank(matrix, [region])
    written = codec.encode(result, region, kept)
    assert torch.equal(written, result.decode())
    return result


def assert_same_bytes(one: PackedMatrix, other: PackedMatrix) -> None:
    for before, after in zip(one.parts, other.parts, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (before, after)))


def fp8_matrix(rows: int, columns: int, block: tuple[int, int], scale: str, seed: int) -> PackedMatrix:
    """Random codes, zeros of both signs and subnormals among them, but not the two for NaN."""
    codes = codes_of((rows, columns), seed)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    codes[: max(1, rows // 3)] &= 0x87  # subnormal
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    exponents = torch.randint(-30, 20, grid, generator=torch.Generator().manual_seed(seed))
    scales = torch.ldexp(
        torch.rand(grid, generator=torch.Generator().manual_seed(seed)) + 0.5
        if scale in ("F32", "BF16")
        else torch.ones(grid),
        exponents,
    )
    kinds = {"BF16": torch.bfloat16, "E8M0": torch.float8_e8m0fnu}
    stored = (exponents + 127).to(torch.uint8) if scale == "U8" else scales.to(kinds.get(scale, torch.float32))
    return PackedMatrix((rows, columns), Fp8Codec(block), (codes.view(FP8), stored))


@QUICK
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(16, 16), (1, 40), (40, 40), (128, 128)]),
    st.sampled_from(["F32", "BF16", "power of 2", "U8", "E8M0"]),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_fp8_values_encode_to_the_bytes_they_came_from(
    rows: int, columns: int, block: tuple[int, int], scale: str, seed: int, keeping: bool
) -> None:
    matrix = fp8_matrix(rows, columns, block, scale, seed)
    kept = Kept(torch.full((rows, 1), rows**-0.5), 0) if keeping else None
    assert_same_bytes(encoded(matrix, matrix.decode(), kept), matrix)


@QUICK
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 10_000), st.integers(0, 248), st.booleans())
def test_mxfp4_values_encode_to_the_bytes_they_came_from(
    out: int, count: int, seed: int, exponent: int, keeping: bool
) -> None:
    codes = codes_of((out, count, 16), seed)
    codes[0] &= 0x88  # a block of zeros
    exponents = (exponent + codes_of((out, count), seed + 1) % 4).to(torch.uint8)
    matrix = PackedMatrix((count * 32, out), Mxfp4Codec(), (codes, exponents))
    kept = Kept(torch.full((out, 1), out**-0.5), 1) if keeping else None
    assert_same_bytes(encoded(matrix, matrix.decode(), kept), matrix)


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.data())
def test_a_region_of_fp8_is_a_part_of_the_whole(rows: int, columns: int, seed: int, data: Any) -> None:
    matrix = fp8_matrix(rows, columns, (16, 16), "F32", seed)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    part = matrix.decode(slice(top, top + 9), slice(left, left + 9))
    assert torch.equal(part, matrix.decode()[top : top + 9, left : left + 9])


def test_codes_for_no_number_are_not_numbers() -> None:
    matrix = fp8_matrix(4, 4, (4, 4), "F32", 0)
    matrix.parts[0].view(torch.uint8)[1, 2] = 0xFF
    assert matrix.decode().isnan().nonzero().tolist() == [[1, 2]]
    packed = PackedMatrix((32, 2), Mxfp4Codec(), (codes_of((2, 1, 16), 0), torch.tensor([[120], [255]]).byte()))
    assert packed.decode().isnan().all(dim=0).tolist() == [False, True]


def test_new_fp8_scales_are_those_of_the_largest_values() -> None:
    matrix = fp8_matrix(20, 40, (16, 16), "F32", 3)
    values, largest = matrix.decode(), 450 * float(matrix.parts[1][0, 1])
    values[3, 18] = largest
    result = encoded(matrix, values)
    assert (result.parts[1] != matrix.parts[1]).nonzero().tolist() == [[0, 1]]
    assert float(result.parts[1][0, 1]) == pytest.approx(largest / 448)
    assert float(result.decode()[3, 18]) == pytest.approx(largest)
    powers = fp8_matrix(20, 40, (16, 16), "power of 2", 3)
    values = powers.decode()
    values[3, 18] = 450 * powers.parts[1][0, 1]
    factors = encoded(powers, values).parts[1] / powers.parts[1]
    assert factors.tolist() == [[1, 2, 1], [1, 1, 1]]


@pytest.mark.parametrize("factor", [1.2, 2.0, 30.0, 0.4, 0.01])
def test_mxfp4_blocks_get_the_exponent_with_the_smallest_error(factor: float) -> None:
    values = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    start = PackedMatrix((64, 6), Mxfp4Codec(), (codes_of((6, 2, 16), 0), torch.full((6, 2), 127).byte()))
    first = encoded(start, values)
    result = encoded(first, values * factor)
    for exponent in range(110, 140):
        exponents = torch.full((6, 2), exponent).byte()
        scale = torch.ldexp(torch.ones(1), torch.tensor(exponent - 127))
        tried = (E2M1.nearest(values * factor / scale) * scale - values * factor).square()
        mine = (result.decode() - values * factor).square()
        assert (mine.T.reshape(6, 2, 32).sum(-1) <= tried.T.reshape(6, 2, 32).sum(-1) * 1.0001).all(), exponents


# -- rounding -------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=50))
def test_values_are_rounded_as_torch_rounds_them(values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(E4M3.nearest(x), x.clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize(("kind", "step"), [(E4M3, 0.3), (E2M1, 0.3), (E4M3, 0.001)])
@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_keeps_products_and_gives_a_neighbour(kind: Minifloat, step: float, axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 2, generator=generator)).Q
    scale = torch.tensor(0.01)
    grid = kind.nearest(torch.randn(256, 40, generator=generator) * kind.largest / 4)
    values = (grid - step * basis @ (basis.T @ grid)) * scale
    numbers = round_keeping(values if axis == 0 else values.T, scale, kind, Kept(basis, axis))
    numbers = numbers if axis == 0 else numbers.T
    wanted = values / scale
    assert torch.equal(kind.nearest(numbers), numbers)
    inside = wanted.abs() <= kind.largest
    assert ((numbers - wanted).abs() <= kind.spacing(wanted) * 1.0001)[inside].all()
    left = torch.linalg.vector_norm(basis.T @ (numbers - wanted))
    nearest = torch.linalg.vector_norm(basis.T @ (kind.nearest(wanted) - wanted))
    assert left < nearest / 10


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    R.save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


def source_of(form: str, folder: Path) -> Checkpoint:
    return packed_gpt_oss(folder) if form == "MXFP4" else fp8_model(folder, form)


FORMS = (*FP8_FORMS, "MXFP4")


def stored(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: bytes(checkpoint.tensors.read_bytes(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize("form", FORMS)
def test_without_an_edit_every_byte_is_the_source_s(tmp_path: Path, refusal: Path, form: str) -> None:
    source = source_of(form, tmp_path / "model")
    nothing = replace(ALL, strength=0.0, skip_begin_layers=0, skip_end_layers=0, norm_preserving=False)
    written, applied = apply(
        str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=nothing, out_dtype="keep"
    )
    assert len(applied.leaks) == (8 if form == "MXFP4" else 25)
    assert stored(written) == stored(source)
    assert written.config == source.config


@pytest.mark.parametrize("form", FP8_FORMS)
def test_fp8_models_are_decoded_where_they_are_read(tmp_path: Path, form: str) -> None:
    source = resolve(str(fp8_model(tmp_path / "model", form).folder))
    decoded = fp8_decoded(source)
    assert source.tensors.shapes == {name: tuple(tensor.shape) for name, tensor in decoded.items()}
    assert source.parameters == sum(tensor.numel() for tensor in decoded.values())
    model = ChatModel.load(source, LoadSettings(device="cpu", dtype="float32"))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, decoded[name]), name
    assert not hasattr(model.module.config, "quantization_config")


def edited(source: Checkpoint, folder: Path, refusal: Path, out_dtype: str, **changes: Any) -> Checkpoint:
    settings = replace(ALL, **changes)
    return apply(str(source.folder), folder, refusal_pt=refusal, settings=settings, out_dtype=out_dtype)[0]


@pytest.mark.parametrize("form", ["block", "tensor", "MXFP4"])
@pytest.mark.parametrize("out_dtype", ["keep", "auto"])
def test_an_edited_model_loads_in_transformers(tmp_path: Path, refusal: Path, form: str, out_dtype: str) -> None:
    written = edited(source_of(form, tmp_path / "model"), tmp_path / "edited", refusal, out_dtype)
    assert ("quantization_config" in written.config) == (out_dtype == "keep")
    theirs = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32)
    ours = ChatModel.load(written, LoadSettings(device="cpu", dtype="float32")).module
    ids = torch.arange(12).unsqueeze(0) + 60
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["block", "channel", "tensor"])
def test_auto_writes_bf16_without_scales(tmp_path: Path, refusal: Path, form: str) -> None:
    source = fp8_model(tmp_path / "model", form)
    extra = {"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}
    path = source.folder / "model.safetensors"
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    written = edited(source, tmp_path / "edited", refusal, "auto", targets=("writers",))
    decoded = fp8_decoded(source)
    after = load_file(written.folder / "model.safetensors")
    assert set(after) == {name for name in decoded if "scale" not in name}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name in after:
        if not name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            assert torch.equal(after[name], decoded[name].bfloat16()), name
    kept = edited(source, tmp_path / "kept", refusal, "keep", targets=("writers",))
    assert torch.equal(load_file(kept.folder / "model.safetensors")[next(iter(extra))], torch.ones(1))


@pytest.mark.parametrize("form", ["block", "channel"])
def test_scales_in_another_shard_are_those_of_their_codes(tmp_path: Path, refusal: Path, form: str) -> None:
    source = fp8_model(tmp_path / "model", form)
    tensors = load_file(source.folder / "model.safetensors")
    apart = {name: f"model-{1 + ('_scale' not in name)}-of-2.safetensors" for name in tensors}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard in set(apart.values()):
        save_file({n: t for n, t in tensors.items() if apart[n] == shard}, folder / shard, metadata={"format": "pt"})
    for path in source.folder.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    index = {"metadata": {}, "weight_map": apart}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = edited(source, tmp_path / "edited", refusal, "keep")
    sharded = edited(Checkpoint(folder, "sharded", "folder"), tmp_path / "edited in parts", refusal, "keep")
    assert stored(sharded) == stored(whole)
    assert stored(whole) != stored(source)


@pytest.mark.parametrize("form", FP8_FORMS)
@pytest.mark.parametrize("changes", [{}, {"targets": ("writers",), "norm_preserving": False, "strength": -6.0}])
def test_fp8_edited_by_blocks_is_fp8_edited_whole(
    tmp_path: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch, form: str, changes: dict[str, Any]
) -> None:
    source = fp8_model(tmp_path / "model", form)
    whole = edited(source, tmp_path / "whole", refusal, "keep", **changes)
    monkeypatch.setattr(blocks, "BLOCK", 300)
    apart = edited(source, tmp_path / "apart", refusal, "keep", **changes)
    for name in whole.tensors.packed:
        before, after = (made.tensors.read_packed(name) for made in (whole, apart))
        assert torch.allclose(before.parts[1].float(), after.parts[1].float(), rtol=1e-5)
        same = torch.isclose(before.decode(), after.decode(), rtol=1e-5, atol=0)  # a scale may be a bit apart
        assert same.float().mean() > 0.9, name  # sums in another order move a few values across a tie


# -- what rounding leaves, and verify -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["block", "channel", "MXFP4"])
def test_what_rounding_leaves_of_the_direction_is_measured(
    tmp_path: Path, refusal: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(form, tmp_path / "model")
    changes = {"targets": ("writers",), "norm_preserving": False}
    written = edited(source, tmp_path / "edited", refusal, "keep", **changes)
    record = read_json(written.folder / "abliteration.json")["changed"]
    r = R.vectors[0]
    label = "MXFP4" if form == "MXFP4" else "FP8"
    for name, packed in written.tensors.packed.items():
        if name not in record:
            continue
        experts = range(packed.shape[0]) if packed.is_stack else [None]
        before, after = (
            torch.stack([made.tensors.read_packed(name, e).decode() for e in experts]) for made in (source, written)
        )
        axis = "...ij,j->...i" if packed.is_stack else "...ij,i->...j"
        left = torch.einsum(axis, after, r).norm() / torch.einsum(axis, before, r).norm()
        assert record[name]["stored_as"] == label
        assert record[name]["leak"] == pytest.approx(float(left), rel=1e-2, abs=1e-5)
        assert 0 < left < 0.08
    assert f"stored as {label}: rounding undoes " in capsys.readouterr().err


def checked(source: Checkpoint, written: Checkpoint, plan: EditPlan) -> list[Check]:
    model = ChatModel.load(written, LoadSettings(device="cpu", dtype="float32"))
    return verify(source, written, model, plan, R)


def plan_of(source: Checkpoint) -> EditPlan:
    return plan_orthogonal(map_checkpoint(source), R, ALL, vector_reader(source.tensors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out_dtype", ["keep", "auto"])
def test_an_honest_edit_passes(tmp_path: Path, refusal: Path, form: str, out_dtype: str) -> None:
    source = source_of(form, tmp_path / "model")
    written = edited(source, tmp_path / "edited", refusal, out_dtype)
    assert [check for check in checked(source, written, plan_of(source)) if not check.passed] == []


O_PROJ, Q_PROJ = "model.layers.2.self_attn.o_proj.weight", "model.layers.0.self_attn.q_proj.weight"
STACK = "model.layers.1.mlp.experts.down_proj"


def wrong_scale(tensors: Tensors) -> None:
    tensors[f"{O_PROJ}_scale_inv"][0, 1] *= 2


def codes_of_the_source(tensors: Tensors) -> None:
    """One edited row, as nearest values of the source would be."""
    tensors[O_PROJ][3] = tensors[O_PROJ][4]


def wrong_unedited_scale(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}_scale_inv"][1, 0] *= 1.01


def lost_unedited_scale(tensors: Tensors) -> None:
    del tensors[f"{Q_PROJ}_scale_inv"]


def swapped_nibbles(tensors: Tensors) -> None:
    tensors[f"{STACK}_blocks"][1] = (tensors[f"{STACK}_blocks"][1] >> 4) | (tensors[f"{STACK}_blocks"][1] << 4)


def next_exponent(tensors: Tensors) -> None:
    tensors[f"{STACK}_scales"][3, 5, 0] += 1


@pytest.mark.parametrize(
    ("form", "fault", "where"),
    [
        ("block", wrong_scale, O_PROJ),
        ("block", codes_of_the_source, O_PROJ),
        ("block", wrong_unedited_scale, Q_PROJ),
        ("block", lost_unedited_scale, Q_PROJ),
        ("MXFP4", swapped_nibbles, STACK),
        ("MXFP4", next_exponent, STACK),
    ],
)
def test_a_wrong_checkpoint_is_noticed(
    tmp_path: Path, refusal: Path, form: str, fault: Callable[[Tensors], None], where: str
) -> None:
    source = source_of(form, tmp_path / "model")
    written = edited(source, tmp_path / "edited", refusal, "keep")
    path, plan = written.folder / "model.safetensors", plan_of(source)
    assert (where in plan.edits) != ("unedited" in fault.__name__)
    model = ChatModel.load(written, LoadSettings(device="cpu", dtype="float32"))
    tensors = load_file(path)
    fault(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    checks = verify(source, Checkpoint(written.folder, "edited", "folder"), model, plan, R)
    assert any(where in check.where for check in checks if not check.passed)


# -- refused --------------------------------------------------------------------------------------------------------


def test_damaged_codes_are_refused(tmp_path: Path, refusal: Path) -> None:
    source = fp8_model(tmp_path / "model", "block")
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    tensors[O_PROJ].view(torch.uint8)[2, 3] = 0x7F
    save_file(tensors, path, metadata={"format": "pt"})
    for out_dtype in ("keep", "auto"):
        with pytest.raises(ForgeError, match=f"{O_PROJ} of .* holds NaN"):
            edited(source, tmp_path / "edited", refusal, out_dtype)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}_scale_inv"), Q_PROJ),
        (lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].float().to(torch.float8_e5m2)}), Q_PROJ),
        (lambda tensors: tensors.update({f"{Q_PROJ}_scale_inv": torch.ones(3, 5)}), Q_PROJ),
        (lambda tensors: tensors.update({"model.extra": torch.ones(3, 5, dtype=torch.int8)}), "model.extra"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_loaded(
    tmp_path: Path, change: Callable[[Tensors], None], name: str
) -> None:
    folder = fp8_model(tmp_path / "model", "block").folder
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForgeError, match=f"its tensor {name} cannot be edited") as caught:
        resolve(str(folder))
    assert caught.value.hint == "use the unquantised model"


def test_the_block_size_is_that_of_the_config(tmp_path: Path) -> None:
    folder = fp8_model(tmp_path / "model", "block").folder
    mark(folder, {"quant_method": "fp8", "weight_block_size": [2 * BLOCK, BLOCK]})
    with pytest.raises(ForgeError, match="cannot be edited"):
        resolve(str(folder))

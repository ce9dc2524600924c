"""Rows of ggml types: decoded and encoded as llama.cpp does, and encoded so that an edit keeps its products."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ollama_forge.checkpoints.formats.rounding import Kept
from ollama_forge.checkpoints.gguf import keeping
from ollama_forge.checkpoints.gguf.block_types import BLOCK_TYPES
from ollama_forge.checkpoints.gguf.codec import decode_rows, encode_rows, spacing
from ollama_forge.checkpoints.gguf.keeping import encode_keeping
from ollama_forge.checkpoints.gguf.types import block_size, can_decode, can_encode, nearest_encodable
from ollama_forge.errors import ForgeError

FLOATS = (Type.F32, Type.F16, Type.BF16)
CODEBOOKS = (Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_XS)  # the tables of the other ones take libgguf seconds to build
KINDS = [*FLOATS, *BLOCK_TYPES, *CODEBOOKS]


def gaussian(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


def unit(size: int, seed: int = 1) -> Tensor:
    return torch.nn.functional.normalize(gaussian(size, 1, seed), dim=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_decode_as_in_gguf_py(kind: Type) -> None:
    values = gaussian(6, 512)
    data = encode_rows(values, kind)
    assert data.shape == (6, 512 // block_size(kind)[0] * block_size(kind)[1])
    decoded = decode_rows(data, kind)
    assert np.allclose(decoded, gguf.quants.dequantize(data.numpy(), kind), rtol=1e-5, atol=1e-6)
    assert (decoded - values).norm() < 0.8 * values.norm()
    wide = torch.cat([data, data], 1)[:, : data.shape[1]]  # rows that are apart in memory
    assert torch.equal(decode_rows(wide, kind, slice(40, 300)), decoded[:, 40:300])


def test_bytes_that_are_not_aligned() -> None:
    data = torch.arange(17, dtype=torch.uint8)
    decoded = decode_rows(data[1:].view(1, 16), Type.F32)
    assert torch.equal(decoded, data[1:].clone().view(torch.float32).view(1, 4))
    decoded.zero_()
    assert data[1] == 1  # decoded values are in memory of their own


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_codes_are_read_and_written_in_place(kind: Type, seed: int) -> None:
    layout = BLOCK_TYPES[kind]
    random = torch.Generator().manual_seed(seed)
    blocks, others = torch.randint(0, 256, (2, 8, layout.bytes), dtype=torch.uint8, generator=random)
    codes = layout.codes(blocks)
    written = blocks.clone()
    layout.write_codes(written, layout.codes(others))
    assert torch.equal(layout.codes(written), layout.codes(others))
    before, after = layout.scales(blocks), layout.scales(written)
    assert torch.equal(before.scale.nan_to_num(), after.scale.nan_to_num())
    layout.write_codes(written, codes)
    assert torch.equal(written, blocks)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_a_value_is_its_level_times_the_scale(kind: Type) -> None:
    layout, data = BLOCK_TYPES[kind], encode_rows(gaussian(32, 256), kind)
    blocks = data.view(-1, layout.bytes)
    scales, codes = layout.scales(blocks), layout.codes(blocks)
    levels = torch.tensor(layout.levels, dtype=torch.float32)[codes.long()].view(*scales.scale.shape, -1)
    values = levels * scales.scale.unsqueeze(2) - (0 if scales.minimum is None else scales.minimum.unsqueeze(2))
    assert torch.equal(values.view(32, 256), decode_rows(data, kind))
    assert torch.equal(decode_rows(data, kind), decode_rows(_with_codes(kind, data, layout.codes_of(levels)), kind))


def _with_codes(kind: Type, data: Tensor, codes: Tensor) -> Tensor:
    layout, written = BLOCK_TYPES[kind], data.clone()
    layout.write_codes(written.view(-1, layout.bytes), codes.view(-1, layout.size))
    return written


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_a_type_does_not_hold(kind: Type, value: float) -> None:
    values = gaussian(2, 256)
    values[1, 7] = value
    if value == 3e38 and kind in (Type.F32, Type.BF16):
        assert decode_rows(encode_rows(values, kind), kind)[1, 7] == pytest.approx(value, rel=0.01)
        return
    if value == 3e38 and kind == Type.MXFP4:
        assert encode_rows(values, kind).shape == (2, 136)  # its exponents reach further than float16
        return
    for refused in (lambda: encode_rows(values, kind), lambda: encode_keeping(values, kind, Kept(unit(2), 0))):
        with pytest.raises(ForgeError, match=f"too large for {kind.name}"):
            refused()


def test_types_without_values() -> None:
    assert not can_decode(Type.Q8_K)
    with pytest.raises(ForgeError, match="Q8_K cannot be decoded"):
        decode_rows(torch.zeros(1, block_size(Type.Q8_K)[1], dtype=torch.uint8), Type.Q8_K)
    assert can_decode(Type.TQ1_0)
    assert not can_encode(Type.TQ1_0)
    assert all(can_encode(kind) for kind in (*KINDS, Type.IQ1_S, Type.IQ1_M, Type.IQ2_S, Type.IQ2_XXS))


def test_the_type_that_stands_in() -> None:
    assert nearest_encodable(Type.TQ2_0, 512) == Type.Q2_K
    assert nearest_encodable(Type.NVFP4, 512) == Type.Q4_K
    assert nearest_encodable(Type.NVFP4, 576) == Type.Q5_0
    assert nearest_encodable(Type.NVFP4, 500) == Type.F16


def edited(kind: Type, axis: int) -> tuple[Tensor, Tensor, Kept]:
    """The bytes of a matrix, the matrix without a direction, and the products that have become zero."""
    before = encode_rows(gaussian(96, 512), kind)
    weight, direction = decode_rows(before, kind), unit((96, 512)[axis])
    component = direction @ (direction.T @ weight) if axis == 0 else (weight @ direction) @ direction.T
    return before, weight - component, Kept(direction, axis)


@pytest.mark.parametrize("axis", [0, 1], ids=["writer", "reader"])
@pytest.mark.parametrize("kind", [*FLOATS[1:], *BLOCK_TYPES], ids=lambda kind: kind.name)
def test_an_edit_keeps_its_products(kind: Type, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_CHUNK", 1 << 14)  # several parts
    before, weight, kept = edited(kind, axis)
    removed = kept.product(decode_rows(before, kind)).norm()
    nearest = decode_rows(encode_rows(weight, kind), kind)
    encoded = encode_keeping(weight, kind, kept, previous=before)
    assert torch.equal(encoded.written, decode_rows(encoded.data, kind))
    leak, leak_of_nearest = (kept.product(values).norm() / removed for values in (encoded.written, nearest))
    assert leak < max(0.005 * leak_of_nearest, 4e-6)
    assert (encoded.written - weight).norm() < 3 * (nearest - weight).norm()
    assert ((encoded.written - weight).abs() <= spacing(encoded.data, kind, weight) * 1.0001 + 1e-6).all()


@pytest.mark.parametrize("kind", [Type.IQ3_S, Type.IQ2_XS], ids=lambda kind: kind.name)
def test_codebooks_keep_most_of_an_edit(kind: Type) -> None:
    before, weight, kept = edited(kind, 0)
    removed = kept.product(decode_rows(before, kind)).norm()
    nearest = kept.product(decode_rows(encode_rows(weight, kind), kind)).norm() / removed
    encoded = encode_keeping(weight, kind, kept, previous=before)
    assert kept.product(encoded.written).norm() / removed < min(0.5, 0.6 * nearest)
    assert ((encoded.written - weight).abs() <= spacing(encoded.data, kind, weight)).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_that_did_not_change_keep_their_bytes(kind: Type) -> None:
    before = encode_rows(gaussian(8, 512), kind)
    weight = decode_rows(before, kind)
    assert torch.equal(encode_keeping(weight, kind, Kept(unit(8), 0), previous=before).data, before)
    changed = weight.clone()
    changed[3, 256:] *= 1.5
    encoded = encode_keeping(changed, kind, Kept(unit(512), 1), previous=before).data
    assert torch.equal(encoded[torch.arange(8) != 3], before[torch.arange(8) != 3])
    assert torch.equal(encoded[3, : encoded.shape[1] // 2], before[3, : encoded.shape[1] // 2])
    assert not torch.equal(encoded[3], before[3])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_zero_rows_and_small_values(kind: Type) -> None:
    values = gaussian(8, 256) * torch.logspace(-30, 2, 8).unsqueeze(1)
    values[2] = 0
    encoded = encode_keeping(values, kind, Kept(unit(8), 0))
    assert (encoded.written[2] == 0).all()
    assert (encoded.written[7] - values[7]).norm() < 0.6 * values[7].norm()
    assert torch.isfinite(encoded.written).all()


@pytest.mark.parametrize("kind", [Type.Q3_K, Type.IQ3_S], ids=lambda kind: kind.name)
def test_importance_moves_the_error_to_other_columns(kind: Type) -> None:
    values, importance = gaussian(64, 256), torch.where(torch.arange(256) % 16 == 0, 100.0, 1.0)
    first, later = (
        encode_keeping(values, kind, None, weights).written.sub(values)[:, ::16].norm()
        for weights in (None, importance)
    )
    assert later < 0.8 * first

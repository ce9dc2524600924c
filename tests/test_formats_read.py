"""Packed formats that are read only: integers of compressed-tensors, AWQ and GPTQ, and bitsandbytes 4-bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollama_forge.api import apply
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.resolve import resolve
from tests import tiny
from tests.packed import mark

GROUP = 8
Packed = tuple[dict[str, Tensor], Tensor]


def word(codes: list[int], bits: int) -> int:
    """Codes in an int32, the first one in the lowest bits."""
    unsigned = sum(code << (place * bits) for place, code in enumerate(codes))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of int32 words, filled with zeros at the end."""
    each = 32 // bits
    rows = [row + [0] * (-len(row) % each) for row in codes.tolist()]
    packed = [[word(row[i : i + each], bits) for i in range(0, len(row), each)] for row in rows]
    return torch.tensor(packed, dtype=torch.int32)


def drawn(rows: int, columns: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[rows, columns]``, and a scale and a zero point for each group of columns."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    scales = (torch.rand(rows, columns // GROUP, generator=generator) * 0.1 + 0.02) / 2 ** (bits - 4)
    return codes, scales.half(), torch.randint(1, 2**bits - 1, scales.shape, generator=generator)


def pack_quantized(rows: int, columns: int, seed: int, bits: int) -> Packed:
    codes, scales, _ = drawn(rows, columns, bits, seed)
    values = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            values[i, j] = scales[i, j // GROUP].float() * (int(codes[i, j]) - 2 ** (bits - 1))
    shape = torch.tensor([rows, columns])
    return {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": shape}, values


def awq(rows: int, columns: int, seed: int, bits: int) -> Packed:
    codes, scales, zeros = drawn(rows, columns, bits, seed)
    values = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            values[i, j] = scales[i, j // GROUP].float() * int(codes[i, j] - zeros[i, j // GROUP])

    def interleaved(matrix: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return words(matrix.reshape(len(matrix), -1, 8)[:, :, order].flatten(1), 4)

    parts = {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T), "scales": scales.T.contiguous()}
    return parts, values


def gptq(rows: int, columns: int, seed: int, bits: int, version: int) -> Packed:
    codes, scales, zeros = drawn(rows, columns, bits, seed)
    groups = torch.arange(columns).flip(0) // GROUP
    values = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            group = int(groups[j])
            values[i, j] = scales[i, group].float() * int(codes[i, j] - zeros[i, group])
    stored = zeros.T - (1 if version == 1 else 0)
    parts = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words(stored, bits)}
    return {**parts, "scales": scales.T.contiguous(), "g_idx": groups.int()}, values


def bitsandbytes(rows: int, columns: int, seed: int, kind: str, nested: bool) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows * columns,), generator=generator)
    table = torch.sort(torch.rand(16, generator=generator) * 2 - 1).values
    block = 64
    count = -(-len(codes) // block)
    parts: dict[str, Tensor] = {"weight.quant_map": table}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    scales = torch.rand(count, generator=generator)
    if nested:
        small = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
        nested_table, nested_scales = (
            torch.rand(256, generator=generator),
            torch.rand(-(-count // 8), generator=generator),
        )
        state |= {"nested_blocksize": 8, "nested_offset": 0.25, "nested_dtype": "float32"}
        parts |= {"weight.nested_absmax": nested_scales, "weight.nested_quant_map": nested_table}
        scales = torch.stack([nested_table[small[i].long()] * nested_scales[i // 8] + 0.25 for i in range(count)])
    parts["weight.absmax"] = small if nested else scales
    pairs = codes.tolist()
    parts["weight"] = torch.tensor([[pairs[i] * 16 + pairs[i + 1]] for i in range(0, len(pairs), 2)], dtype=torch.uint8)
    text = json.dumps(state).encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    values = torch.stack([table[code] * scales[i // block] for i, code in enumerate(pairs)])
    return parts, values.reshape(rows, columns)


def ct_entry(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "compressed-tensors int4": (ct_entry(4), lambda *size: pack_quantized(*size, bits=4)),
    "compressed-tensors int8": (ct_entry(8), lambda *size: pack_quantized(*size, bits=8)),
    "AWQ": (AWQ, lambda *size: awq(*size, bits=4)),
    "GPTQ 4": ({"quant_method": "gptq", "bits": 4}, lambda *size: gptq(*size, bits=4, version=1)),
    "GPTQ 8": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"},
        lambda *s: gptq(*s, bits=8, version=1),
    ),
    "GPTQ v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda *size: gptq(*size, bits=4, version=2),
    ),
    "nf4": (BNB, lambda *size: bitsandbytes(*size, kind="nf4", nested=False)),
    "fp4": (BNB, lambda *size: bitsandbytes(*size, kind="fp4", nested=False)),
    "nf4 twice": (BNB, lambda *size: bitsandbytes(*size, kind="nf4", nested=True)),
}


def quantised_model(folder: Path, case: str) -> dict[str, Tensor]:
    """A tiny model whose attention is in a packed form; returns its tensors as float32 after decoding."""
    entry, pack = CASES[case]
    tiny.save(tiny.build("llama").bfloat16(), folder)
    tensors = load_file(folder / "model.safetensors")
    decoded = {name: tensor.float() for name, tensor in tensors.items()}
    for seed, name in enumerate(sorted(name for name in tensors if "self_attn" in name)):
        parts, decoded[name] = pack(*tensors.pop(name).shape, seed)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mark(folder, entry)
    return decoded


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_are_decoded_edited_and_written_as_bf16(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = quantised_model(tmp_path / "model", case)
    source = resolve(str(tmp_path / "model"))
    assert source.tensors.shapes == {name: tuple(tensor.shape) for name, tensor in decoded.items()}
    module = ChatModel.load(source, LoadSettings(device="cpu", dtype="float32")).module
    for name, tensor in decoded.items():
        torch.testing.assert_close(module.get_parameter(name), tensor, rtol=1e-6, atol=1e-8)
    r = tiny.unit_vector(7)
    RefusalDirection(r.unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    settings = EditSettings(targets=("attention",), norm_preserving=False, skip_begin_layers=1)
    for out_dtype in ("auto", "keep"):
        folder = tmp_path / out_dtype
        apply(str(source.folder), folder, refusal_pt=tmp_path / "refusal.pt", settings=settings, out_dtype=out_dtype)
        after = load_file(folder / "model.safetensors")
        assert after.keys() == decoded.keys()
        assert "quantization_config" not in read_json(folder / "config.json")
        first, edited = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"
        assert torch.equal(after[first], decoded[first].bfloat16())
        wanted = decoded[edited] - torch.outer(r, r @ decoded[edited])
        torch.testing.assert_close(after[edited].float(), wanted, rtol=2**-7, atol=1e-4)
        assert "weights were decoded and written as bf16" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_keep_leaves_them_packed_where_none_is_edited(tmp_path: Path, case: str) -> None:
    quantised_model(tmp_path / "model", case)
    RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    source = resolve(str(tmp_path / "model"))
    settings = EditSettings(targets=("embedding",))
    written, applied = apply(
        str(source.folder), tmp_path / "kept", refusal_pt=tmp_path / "refusal.pt", settings=settings, out_dtype="keep"
    )
    assert applied.changed == {"model.embed_tokens.weight"}
    assert written.tensors.keys() == source.tensors.keys()
    for name in source.tensors.keys() - applied.changed:
        assert written.tensors.read_bytes(name) == source.tensors.read_bytes(name)


@pytest.mark.parametrize(
    ("case", "entry"),
    [
        ("AWQ", {**AWQ, "version": "gemv"}),
        ("AWQ", {**AWQ, "zero_point": False}),
        ("GPTQ 4", {"quant_method": "gptq", "bits": 3}),
        ("GPTQ 4", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
        ("nf4", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("compressed-tensors int4", {**ct_entry(4), "format": "marlin-24"}),
        ("compressed-tensors int4", ct_entry(3)),
    ],
)
def test_other_variants_are_refused(tmp_path: Path, case: str, entry: dict[str, Any]) -> None:
    quantised_model(tmp_path / "model", case)
    mark(tmp_path / "model", entry)
    with pytest.raises(ForgeError, match="is quantised"):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("case", "part"),
    [("AWQ", "qzeros"), ("GPTQ 4", "g_idx"), ("nf4", "weight.absmax"), ("compressed-tensors int4", "weight_scale")],
)
def test_a_lost_part_is_refused(tmp_path: Path, case: str, part: str) -> None:
    quantised_model(tmp_path / "model", case)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.2.self_attn.v_proj.{part}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ForgeError, match=r"its tensor model\.layers\.2\.self_attn\.v_proj\..* cannot be edited"):
        resolve(str(tmp_path / "model"))

"""Reading and writing safetensors by byte ranges, and storage types."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ollama_forge.checkpoints.formats.mxfp4 import decode_mxfp4, mxfp4_shape
from ollama_forge.checkpoints.storage import FLOAT_TYPES, decode_tensor, encode_tensor
from ollama_forge.checkpoints.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointTensors,
    TensorInfo,
    item_size,
    read_header,
)
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.errors import ForgeError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
QUICK = settings(max_examples=60, deadline=None)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    kinds = draw(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    made = {}
    for name, (kind, shape) in kinds.items():
        raw = torch.randn(shape, generator=generator) * 50
        made[name] = (raw.abs() if kind == "U8" else raw).to(DTYPES[kind])
    return made


@contextmanager
def scratch() -> Iterator[Path]:
    """hypothesis runs many examples in one test, so no tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype
        assert right[name].shape == tensor.shape
        assert raw_bytes(right[name]) == raw_bytes(tensor)


def assemble(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_all(folder: Path) -> None:
    """Everything that can be asked of a checkpoint's tensors."""
    tensors = CheckpointTensors(folder)
    for name, info in tensors.items():
        data = tensors.read_bytes(name)
        assert len(data) == info.size == info.count * item_size(info.dtype)
        if info.dtype in FLOAT_TYPES:
            assert tuple(decode_tensor(data, info.dtype, info.shape).shape) == info.shape


def sample_bytes() -> bytes:
    with scratch() as folder:
        save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, folder / SINGLE_NAME)
        return (folder / SINGLE_NAME).read_bytes()


SAMPLE = sample_bytes()
DATA_SIZE = 6 * 4 + 4 * 8
HEADER_END = len(SAMPLE) - DATA_SIZE


# Reading


@QUICK
@given(tensor_dicts())
def test_what_safetensors_writes_is_read_back(tensors: dict[str, torch.Tensor]) -> None:
    with scratch() as folder:
        save_file(tensors, folder / SINGLE_NAME)
        found = CheckpointTensors(folder)
        assert set(found) == set(tensors)
        assert len(found) == len(tensors)
        assert sum(info.size for info in found.values()) == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            info = found[name]
            assert DTYPES[info.dtype] is tensor.dtype
            assert info.shape == tuple(tensor.shape)
            data = found.read_bytes(name)
            assert bytes(data) == raw_bytes(tensor)
            if info.dtype in FLOAT_TYPES:
                values = decode_tensor(data, info.dtype, info.shape)
                assert values.dtype == torch.float32
                assert torch.equal(values, tensor.float())


def test_part_of_a_tensor_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(SAMPLE)
    found = CheckpointTensors(tmp_path)
    whole = raw_bytes(torch.arange(6.0))
    assert bytes(found.read_bytes("a", 4, 8)) == whole[4:12]
    assert bytes(found.read_bytes("a", 16)) == whole[16:]


def test_tensors_come_in_the_order_of_their_bytes_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    header = {
        "later": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "__metadata__": {"format": "pt"},
        "first": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    path.write_bytes(assemble(header, b"abcde"))
    infos, metadata = read_header(path)
    assert list(infos) == ["first", "later"]
    assert metadata == {"format": "pt"}
    found = CheckpointTensors(tmp_path)
    assert [bytes(found.read_bytes(info.name)) for info in found.of_shard(path)] == [b"abc", b"de"]


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 2).bfloat16()}
    parts = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    found = CheckpointTensors(tmp_path)
    assert len(found.shards) == 2
    assert {name: bytes(found.read_bytes(name)) for name in found} == {n: raw_bytes(t) for n, t in tensors.items()}
    assert [info.name for info in found.of_shard(found.shards[1])] == ["c"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ForgeError, match="model-00002-of-00002"):
        CheckpointTensors(tmp_path)


def test_a_tensor_that_only_the_index_has_is_told(tmp_path: Path) -> None:
    """Whether a model can do without it is known where the roles are."""
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    tensors = CheckpointTensors(tmp_path)
    assert tensors.absent == {"ghost.weight"}
    assert "ghost.weight" not in tensors


def test_a_single_file_is_taken_before_an_index(tmp_path: Path) -> None:
    """As transformers takes it; else another model would be edited than is loaded."""
    sharded(tmp_path)
    save_file({"d": torch.ones(3)}, tmp_path / SINGLE_NAME)
    tensors = CheckpointTensors(tmp_path)
    assert (list(tensors), tensors.absent) == (["d"], frozenset())


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shutil.copyfile(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ForgeError, match="two shards"):
        CheckpointTensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "not json", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'),
        '{"weight_map": {"a": null, "b": "model-00001-of-00001.safetensors"}}',
        '{"weight_map": {"a": ["model-00001-of-00001.safetensors"]}}',
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": "/elsewhere.safetensors"}}',
    ],
)
def test_a_bad_index_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(SAMPLE)
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(ForgeError):
        CheckpointTensors(tmp_path)


def test_bin_files_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ForgeError) as caught:
        CheckpointTensors(tmp_path)
    assert ".bin" in caught.value.hint
    assert "convert its .bin files to safetensors" in caught.value.hint


def test_an_empty_folder_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match=r"holds no model\.safetensors") as caught:
        CheckpointTensors(tmp_path)
    assert ".bin" not in caught.value.hint


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ForgeError, match="not a safetensors file"):
        CheckpointTensors(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SAMPLE)):
        (tmp_path / SINGLE_NAME).write_bytes(SAMPLE[:length])
        with pytest.raises(ForgeError):
            CheckpointTensors(tmp_path)


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(SAMPLE)
    found = CheckpointTensors(tmp_path)
    path.write_bytes(SAMPLE[: HEADER_END + 10])
    assert set(found) == {"a", "b"}
    for name in found:
        with pytest.raises(ForgeError, match="truncated"):
            found.read_bytes(name)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="cannot read"):
        read_header(tmp_path / "none.safetensors")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


LIES: dict[str, Any] = {
    "beyond the end": {"a": entry(data_offsets=[1000, 1024])},
    "negative": {"a": entry(data_offsets=[-24, 0])},
    "reversed": {"a": entry(data_offsets=[24, 0])},
    "too small for the shape": {"a": entry(data_offsets=[0, 20])},
    "too large for the shape": {"a": entry(data_offsets=[0, 32])},
    "one offset": {"a": entry(data_offsets=[0])},
    "three offsets": {"a": entry(data_offsets=[0, 24, 48])},
    "offsets of text": {"a": entry(data_offsets=["0", "24"])},
    "fractional offsets": {"a": entry(data_offsets=[0.0, 24.0])},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "two on the same bytes": {"a": entry(), "b": entry()},
    "negative shape": {"a": entry(shape=[-2, -3])},
    "fractional shape": {"a": entry(shape=[2.0, 3.0])},
    "shape of text": {"a": entry(shape=["2", "3"])},
    "shape as text": {"a": entry(shape="23")},
    "shape of lists": {"a": entry(shape=[[2], [3]])},
    "unknown type": {"a": entry(dtype="F31")},
    "type is a list": {"a": entry(dtype=["F32"])},
    "type is a number": {"a": entry(dtype=32)},
    "entry is a list": {"a": [1, 2]},
    "header is a list": [1, 2],
    "header is a number": 3.25,
    "not utf-8": b'{"\xff\xfe": 3}',
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_one_error(tmp_path: Path, lie: str) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(assemble(LIES[lie], bytes(56)))
    with pytest.raises(ForgeError):
        read_all(tmp_path)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(SAMPLE)
    for place, value in changes:
        damaged[place] = value
    with scratch() as folder:
        (folder / SINGLE_NAME).write_bytes(damaged)
        with suppress(ForgeError):
            read_all(folder)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["", "dtype", "shape", "data_offsets", "__metadata__"]), json_values)
def test_any_json_in_a_header_is_read_or_refused(field: str, value: Any) -> None:
    header: dict[str, Any] = {"a": entry(), "__metadata__": {}}
    if field == "__metadata__":
        header[field] = value
    elif field:
        header["a"][field] = value
    else:
        header["a"] = value
    with scratch() as folder:
        (folder / SINGLE_NAME).write_bytes(assemble(header, bytes(24)))
        try:
            read_all(folder)
        except ForgeError:
            return
        assert field, "no drawn value is an entry"


# Writing


@QUICK
@given(tensor_dicts(), st.data())
def test_a_written_shard_is_what_safetensors_reads(tensors: dict[str, torch.Tensor], data: st.DataObject) -> None:
    with scratch() as folder:
        save_file(tensors, folder / SINGLE_NAME)
        sources = CheckpointTensors(folder)
        order = data.draw(st.permutations(list(tensors)))
        copied = {name: data.draw(st.booleans()) for name in order}
        outputs = [
            OutputTensor(name, info.dtype, info.shape, info if copied[name] else None)
            for name, info in ((name, sources[name]) for name in order)
        ]
        assert [output.size for output in outputs] == [tensors[name].nbytes for name in order]
        target = folder / "out.safetensors"
        with ShardWriter(target, outputs) as writer:
            for output in outputs:
                if output.copied is not None:
                    writer.copy(output.copied)
                    continue
                whole = raw_bytes(tensors[output.name])
                cut = data.draw(st.integers(0, len(whole)))
                writer.write([whole[:cut], memoryview(whole)[cut:]])
        assert_equal(tensors, load_file(target))
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert list(read_header(target)[0]) == order


@QUICK
@given(shapes, st.sampled_from(["F32", "F16", "BF16"]), st.integers(0, 1000))
def test_encoded_values_can_be_written(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with scratch() as folder:
        target = folder / "out.safetensors"
        with ShardWriter(target, [OutputTensor("x", dtype, shape)]) as writer:
            writer.write([encode_tensor(values, dtype)])
        assert_equal({"x": values.to(DTYPES[dtype])}, load_file(target))


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_byte_too_few_or_many_is_an_error(tmp_path: Path, count: int) -> None:
    writer = ShardWriter(tmp_path / "out.safetensors", [OutputTensor("x", "F32", (2,))])
    writer.write([bytes(count)])
    with pytest.raises(ForgeError, match="bytes"):
        writer.close()


def test_an_error_inside_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "x", [OutputTensor("x", "F32", (2,))]):
        _ = 1 / 0


def test_copying_from_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(10))
    info = TensorInfo("x", "U8", (20,), source, 0, 20)
    writer = ShardWriter(tmp_path / "out.safetensors", [OutputTensor("x", "U8", (20,), info)])
    writer.copy(info)
    with pytest.raises(ForgeError, match="truncated"):
        writer.close()


# Storage types

BF16_MAX = float(torch.finfo(torch.bfloat16).max)


@QUICK
@given(st.lists(st.floats(-BF16_MAX, BF16_MAX, width=32), min_size=1, max_size=50))
def test_bf16_is_rounded_to_nearest_even_as_torch_does(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    stored = torch.frombuffer(bytearray(encode_tensor(values, "BF16")), dtype=torch.int16).to(torch.int64) & 0xFFFF
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    assert stored.tolist() == ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).tolist()
    assert bytes(encode_tensor(values, "BF16")) == raw_bytes(values.bfloat16())


@pytest.mark.parametrize("dtype", sorted(FLOAT_TYPES))
def test_what_is_decoded_encodes_to_the_same_bytes(dtype: str) -> None:
    stored = encode_tensor(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), dtype)
    again = encode_tensor(decode_tensor(bytearray(stored), dtype, (3, 5)), dtype)
    assert len(stored) == 15 * item_size(dtype)
    assert bytes(again) == bytes(stored)


def midpoints(dtype: str, bits: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 values halfway between a 16-bit float and the next, and the larger of the two."""
    lower, upper = (
        torch.tensor(numbers, dtype=torch.int16).view(DTYPES[dtype]) for numbers in (bits, [b + 1 for b in bits])
    )
    return (lower.double() + upper.double()) / 2, upper


@QUICK
@given(st.sampled_from(["F16", "BF16"]), st.lists(st.integers(1, 0x7BFD), min_size=1, max_size=50), st.booleans())
def test_float64_is_rounded_to_16_bits_once(dtype: str, bits: list[int], negative: bool) -> None:
    middle, upper = midpoints(dtype, bits)
    sign = -1 if negative else 1
    above = torch.nextafter(middle, torch.tensor(torch.inf, dtype=torch.float64))
    assert bytes(encode_tensor(sign * above, dtype)) == raw_bytes(sign * upper)
    even = [b + b % 2 for b in bits]  # a tie goes to the value whose last bit is 0
    assert bytes(encode_tensor(sign * middle, dtype)) == raw_bytes(sign * midpoints(dtype, [b - 1 for b in even])[1])


@pytest.mark.parametrize(("dtype", "fits", "too_large"), [("F16", 65519.0, 65520.0), ("BF16", BF16_MAX, 3.4e38)])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_value_too_large_for_its_type_is_not_made_infinite(
    dtype: str, fits: float, too_large: float, wide: torch.dtype
) -> None:
    values = torch.tensor([[1.0, -fits], [torch.inf, torch.nan]], dtype=wide)
    stored = torch.frombuffer(bytearray(encode_tensor(values, dtype)), dtype=DTYPES[dtype])
    assert stored[1].isfinite()
    assert stored[2].isposinf()
    assert stored[3].isnan()
    values[0, 1] = -too_large
    with pytest.raises(ForgeError, match=f"the head holds the value .* too large for {dtype}") as failure:
        encode_tensor(values, dtype, "the head")
    assert "--out-dtype" in (failure.value.hint or "")


def test_a_transposed_tensor_is_encoded_row_by_row() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert bytes(encode_tensor(values.T, "F32")) == raw_bytes(torch.tensor([0.0, 3, 1, 4, 2, 5]))


def test_integers_cannot_be_edited() -> None:
    with pytest.raises(ForgeError, match="I64"):
        decode_tensor(bytearray(8), "I64", (1,))


def test_an_unknown_storage_type_is_named() -> None:
    with pytest.raises(ForgeError, match="Q4_K"):
        item_size("Q4_K")


# sign, exponent, exponent, mantissa: 0.5 is the one subnormal, the bias is 1
CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_the_sixteen_codes_of_mxfp4() -> None:
    blocks = torch.arange(16, dtype=torch.uint8) | (torch.arange(16, dtype=torch.uint8).flip(0) << 4)
    for scale in (120, 127, 130):
        values = decode_mxfp4(blocks.reshape(1, 16), torch.tensor([scale], dtype=torch.uint8))
        expected = [v for code in range(16) for v in (_code(code), _code(15 - code))]
        assert values.tolist() == [v * 2.0 ** (scale - 127) for v in expected]
        assert values.dtype == torch.float32


def _code(code: int) -> float:
    return math.copysign(CODES[code & 7], -1 if code >= 8 else 1)


@QUICK
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000))
def test_mxfp4_is_decoded_as_transformers_does(experts: int, out: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, count, 16), generator=generator, dtype=torch.uint8)
    blocks.view(-1)[:16] = torch.arange(16, dtype=torch.uint8) * 17
    scales = torch.randint(0, 255, (experts, out, count), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ours = decode_mxfp4(blocks, scales)
    assert tuple(theirs.shape) == mxfp4_shape(tuple(blocks.shape)) == (experts, count * 32, out)
    assert torch.allclose(ours.transpose(1, 2), theirs, rtol=0, atol=0, equal_nan=True)

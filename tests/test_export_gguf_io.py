"""Reading and writing GGUF files: round trips, agreement with gguf-py, and one error for damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.checkpoints.gguf.file import Tensor, Value, read_gguf, value_of, write_header
from ollama_forge.errors import ForgeError
from ollama_forge.export.quantise import rewrite

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(
    TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.lists(TEXT, max_size=5)
)
TENSORS = st.lists(
    st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([Type.F32, Type.F16, Type.Q8_0])),
    max_size=4,
)


def write(path: Path, metadata: dict[str, Value], tensors: list[Tensor]) -> dict[str, bytes]:
    """A file with telling bytes in each tensor; what each holds."""
    held = {}
    with path.open("wb") as file:
        for number, tensor in enumerate(write_header(file, metadata, tensors)):
            held[tensor.name] = bytes((number * 31 + i) % 251 for i in range(tensor.size))
            file.seek(tensor.start)
            file.write(held[tensor.name])
    return held


def bytes_of(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {tensor.name: data[tensor.start : tensor.start + tensor.size] for tensor in read_gguf(path).tensors}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(TEXT.filter(lambda key: key != "general.alignment"), VALUES, max_size=6), TENSORS)
def test_round_trip(tmp_path: Path, values: dict[str, Any], shapes: list[tuple[list[int], Type]]) -> None:
    path = tmp_path / "file.gguf"
    tensors = [
        Tensor(f"t{i}", (shape[0] * (32 if kind == Type.Q8_0 else 1), *shape[1:]), kind)
        for i, (shape, kind) in enumerate(shapes)
    ]
    held = write(path, {key: value_of(value) for key, value in values.items()}, tensors)
    found = read_gguf(path)
    assert {key: value.python() for key, value in found.metadata.items()} == values
    assert [(t.name, t.shape, t.type) for t in found.tensors] == [(t.name, t.shape, t.type) for t in tensors]
    assert bytes_of(path) == held
    assert all(tensor.start % 32 == 0 for tensor in found.tensors)


def written_by_gguf_py(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("näme")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "ö", b"\xff\xfe", "🙂"])
    writer.add_token_types([1, 2, 3, 4])
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_bool("flag", True)
    writer.add_tensor("a.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("b.weight", np.arange(7, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_gguf_py_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    written_by_gguf_py(path)
    found = read_gguf(path)
    assert found.architecture == "llama"
    assert found.get("general.name") == "näme"
    assert found.get("llama.block_count") == 3
    assert found.get("tokenizer.ggml.tokens") == ["a", "ö", "\udcff\udcfe", "🙂"]
    assert found.get("tokenizer.ggml.token_type") == [1, 2, 3, 4]
    assert found.get("numbers") == [1.5, -2.0]
    assert found.get("flag") is True
    assert found.get("absent", 9) == 9
    assert found.tensors[0].shape == (32, 3)
    assert np.frombuffer(bytes_of(path)["a.weight"], np.float32).tolist() == list(range(96))


def test_a_rewritten_file_is_read_by_gguf_py_and_holds_every_byte(tmp_path: Path) -> None:
    path, again = tmp_path / "theirs.gguf", tmp_path / "again.gguf"
    written_by_gguf_py(path)
    file = read_gguf(path)
    rewrite(file, again, {t.name: t.type for t in file.tensors}, {"ollama_forge.x": value_of("y"), "flag": None})
    found = read_gguf(again)
    assert found.get("ollama_forge.x") == "y"
    assert "flag" not in found.metadata
    unchanged = [key for key in file.metadata if key != "flag"]
    assert [found.metadata[key] for key in unchanged] == [file.metadata[key] for key in unchanged]
    assert bytes_of(again) == bytes_of(path)
    theirs = gguf.GGUFReader(again)
    assert [tensor.name for tensor in theirs.tensors] == ["a.weight", "b.weight"]
    assert theirs.tensors[1].data.tolist() == list(range(7))


def test_alignment_is_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    tensors = [Tensor("a", (3,), Type.F32), Tensor("b", (3,), Type.F32)]
    held = write(path, {"general.alignment": value_of(128)}, tensors)
    assert [tensor.start % 128 for tensor in read_gguf(path).tensors] == [0, 0]
    assert bytes_of(path) == held


def test_cut_anywhere_it_is_one_error(tmp_path: Path) -> None:
    path, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    written_by_gguf_py(path)
    data = path.read_bytes()
    end = max(tensor.start + tensor.size for tensor in read_gguf(path).tensors)
    for size in [*range(400), *range(400, end, 7), end - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ForgeError, match=r"truncated|is not a GGUF file|cannot read|is damaged") as caught:
            read_gguf(cut)
        assert "\n" not in caught.value.message
    cut.write_bytes(data[:end])
    read_gguf(cut)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 600), st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "damaged.gguf"
    written_by_gguf_py(path)
    data = bytearray(path.read_bytes())
    data[place] = byte
    path.write_bytes(data)
    try:
        file = read_gguf(path)
        for value in file.metadata.values():
            value.python()
    except ForgeError:
        return
    assert all(tensor.start + tensor.size <= len(data) for tensor in file.tensors)


@pytest.mark.parametrize(
    ("content", "words"), [(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"), (b"zip", "is not")]
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ForgeError, match=words):
        read_gguf(path)
    with pytest.raises(ForgeError, match="cannot read"):
        read_gguf(tmp_path / "absent.gguf")

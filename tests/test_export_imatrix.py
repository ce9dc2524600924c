"""Importance matrices: read in both forms, used matrix by matrix, and refused where they do not fit."""

from __future__ import annotations

import stat
import struct
import sys
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.imatrix import read_imatrix
from ollama_forge.export.quantise import quantise

ATTENTION, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
Entries = dict[str, np.ndarray]


def entries() -> Entries:
    random = np.random.default_rng(2)
    return {ATTENTION: random.chisquare(1, (1, 256)), EXPERTS: random.chisquare(1, (3, 256))}


def older_form(path: Path, held: Entries, calls: int = 4) -> Path:
    data = struct.pack("<i", len(held))
    for name, values in held.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += (values * calls).astype(np.float32).tobytes()
    path.write_bytes(data + struct.pack("<ii", 25, 8) + b"wiki.txt")
    return path


def gguf_form(path: Path, held: Entries) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 25)
    for name, values in held.items():
        counts = np.arange(len(values), dtype=np.float32)[::-1].reshape(-1, 1)  # the last expert saw nothing
        counts = counts + 8 if len(values) == 1 else counts
        writer.add_tensor(f"{name}.in_sum2", (values * counts).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(counts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(folder: Path) -> Path:
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_expert_count(3)
    writer.add_tensor("output.weight", random.standard_normal((32, 256)).astype(np.float32))
    writer.add_tensor(ATTENTION, random.standard_normal((64, 256)).astype(np.float32))
    writer.add_tensor(EXPERTS, random.standard_normal((3, 32, 256)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def test_both_forms(tmp_path: Path) -> None:
    held = entries()
    old, new = read_imatrix(older_form(tmp_path / "old.dat", held)), read_imatrix(gguf_form(tmp_path / "new", held))
    for found in (old, new):
        assert (found.chunks, found.dataset) == (25, "wiki.txt")
        assert np.allclose(found.entries[ATTENTION], held[ATTENTION][0], rtol=1e-6)
    assert np.allclose(old.entries[EXPERTS], held[EXPERTS].reshape(-1))
    assert np.allclose(new.entries[EXPERTS][: 2 * 256], held[EXPERTS][:2].reshape(-1))
    assert (new.entries[EXPERTS][2 * 256 :] == 1).all()  # nothing is known about this expert
    theirs = libgguf.load_imatrix(tmp_path / "new")
    assert all(np.array_equal(new.entries[name], theirs[name]) for name in held)


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ2_XS"])
def test_each_expert_is_quantised_with_its_own_importance(tmp_path: Path, quant: str) -> None:
    held, source, target = entries(), model(tmp_path), tmp_path / "out.gguf"
    imatrix = older_form(tmp_path / "i.dat", {**held, "output.weight": np.ones((1, 256))})
    quantise(source, target, quant, {}, imatrix=imatrix)
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(target).tensors:
        if tensor.name in held:
            rows, weights = (
                values[tensor.name].reshape(-1, 64 if tensor.name == ATTENTION else 32, 256),
                held[tensor.name],
            )
            expected = [
                libgguf.quantize_rows(some, tensor.tensor_type, importance.astype(np.float32))
                for some, importance in zip(rows, weights, strict=True)
            ]
            assert np.array_equal(tensor.data.reshape(-1), np.concatenate(expected).reshape(-1)), tensor.name
            assert not np.array_equal(tensor.data, libgguf.quantize_rows(values[tensor.name], tensor.tensor_type))
    found = {key: read_gguf(target).get(f"quantize.imatrix.{key}") for key in ("file", "dataset", "entries_count")}
    assert found == {"file": "i.dat", "dataset": "wiki.txt", "entries_count": 3}
    assert read_gguf(target).get("quantize.imatrix.chunks_count") == 25


def test_a_tensor_without_an_entry_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    imatrix = older_form(tmp_path / "i.dat", {ATTENTION: entries()[ATTENTION]})
    quantise(source, target, "Q4_K_M", {}, imatrix=imatrix)
    assert "no entry for output.weight and 1 more of 3 tensors" in capsys.readouterr().err
    target.unlink()
    with pytest.raises(ForgeError, match=r"no entry for blk\.0\.ffn_up_exps\.weight, which IQ2_XS needs"):
        quantise(source, target, "IQ2_XS", {}, imatrix=imatrix)
    with pytest.raises(UsageError, match="IQ2_XS has too few bits") as caught:
        quantise(source, target, "IQ2_XS", {})
    assert "--imatrix" in caught.value.hint
    assert not target.exists()
    quantise(source, target, "IQ4_XS", {})
    assert Type.IQ4_XS in {tensor.type for tensor in read_gguf(target).tensors}


def test_one_for_another_model(tmp_path: Path) -> None:
    imatrix = older_form(tmp_path / "i.dat", {EXPERTS: np.ones((2, 256))})
    with pytest.raises(ForgeError, match=r"i\.dat is for another model: it has 512 numbers for .*, which takes 768"):
        quantise(model(tmp_path), tmp_path / "out.gguf", "Q4_K_M", {}, imatrix=imatrix)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-1.0]])
def test_values_that_are_no_mean_squares(tmp_path: Path, values: list[float]) -> None:
    with pytest.raises(ForgeError, match=r"is damaged: 'blk\.0\.attn_q\.weight' holds NaN"):
        read_imatrix(older_form(tmp_path / "i.dat", {ATTENTION: np.array([values])}))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), is_gguf=st.booleans())
def test_damaged_files_are_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, is_gguf: bool
) -> None:
    path = tmp_path_factory.mktemp("imatrix") / "i"
    whole = (gguf_form if is_gguf else older_form)(path, entries()).read_bytes()
    place, byte = data.draw(st.integers(0, min(len(whole), 600) - 1)), data.draw(st.integers(0, 255))
    changed = whole[:place] if data.draw(st.booleans()) else whole[:place] + bytes([byte]) + whole[place + 1 :]
    path.write_bytes(changed)
    message = ""
    try:
        read_imatrix(path)
    except ForgeError as error:
        message = error.message
    assert message == "" or (str(path) in message and "\n" not in message)


def test_the_tool_gets_the_file(tmp_path: Path) -> None:
    tool, seen = tmp_path / "llama-quantize", tmp_path / "seen"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))\nsys.exit(1)\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    source, imatrix = model(tmp_path), older_form(tmp_path / "i.dat", entries())
    quantise(source, tmp_path / "out.gguf", "Q4_K_M", {}, str(tool), imatrix=imatrix)
    assert seen.read_text().startswith(f"--imatrix {imatrix} {source} ")

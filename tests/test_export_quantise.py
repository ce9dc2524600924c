"""The embedded quantiser: rows and types equal llama.cpp's, and a failure leaves no partial file."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf import file as gguf_io
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, read_gguf, value_of
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export import mix, quantise

DATA = Path(__file__).resolve().parent / "data"
ROWS = np.load(DATA / "quantised.npz")
MODELS: dict[str, Any] = json.loads((DATA / "types.json").read_text(encoding="utf-8"))
CASES = [name for name in ROWS.files if not name.startswith("rows.")]
NOTHING: dict[str, gguf_io.Value] = {}


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    for name, values in tensors.items():
        bits = values.dtype == np.uint16  # stands for bf16
        writer.add_tensor(name, values, raw_dtype=Type.BF16 if bits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def held(path: Path, name: str) -> np.ndarray:
    """A tensor as bytes, row by row."""
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)
    with path.open("rb") as file:
        file.seek(tensor.start)
        return np.frombuffer(file.read(tensor.size), np.uint8).reshape(tensor.rows, -1)


def error_of(packed: np.ndarray, kind: Type, rows: np.ndarray) -> float:
    return float(np.sqrt(((gguf.quants.dequantize(packed, kind) - rows) ** 2).mean()))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_as_near_as_those_of_the_real_tool(tmp_path: Path, case: str) -> None:
    name, rows_of = case.split(".")
    rows, kind = ROWS[f"rows.{rows_of}"], Type[name]
    source = read_gguf(write(tmp_path / "rows.gguf", {"a.weight": rows}))
    quantise.rewrite(source, tmp_path / "out.gguf", {"a.weight": kind}, {})
    ours = error_of(held(tmp_path / "out.gguf", "a.weight"), kind, rows)
    assert 0 < ours <= 1.05 * error_of(ROWS[case], kind, rows)


def properties_of(model: dict[str, Any], folder: Path) -> mix.ModelProperties:
    """The shape as read from a file's metadata."""
    arch = model["arch"]
    metadata = {
        "general.architecture": value_of(arch),
        f"{arch}.block_count": value_of(model["layers"]),
        f"{arch}.attention.head_count": value_of(model["heads"]),
        f"{arch}.attention.head_count_kv": value_of(model["kv"]),
        f"{arch}.expert_count": value_of(model["experts"]),
    }
    return mix.ModelProperties.of(Gguf(folder, metadata, ()))


@pytest.mark.parametrize("imatrix", [False, True], ids=["", "imatrix"])
@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_that_the_real_tool_printed(tmp_path: Path, name: str, imatrix: bool) -> None:
    model = MODELS[name]
    tensors = [Tensor(tensor, tuple(shape), Type[kind]) for tensor, (shape, kind) in model["tensors"].items()]
    printed = model["types with imatrix" if imatrix else "types"]
    assert len(printed) >= 9
    for quant, real in printed.items():
        ours = mix.tensor_types(quant, properties_of(model, tmp_path), tensors, has_imatrix=imatrix)
        assert " ".join(ours[tensor.name].name for tensor in tensors) == real, quant


def test_names_of_types() -> None:
    assert mix.parse_quant(" q4_k ") == "Q4_K_M"
    assert {"Q2_K", "Q3_K_S", "Q3_K_L", "Q5_K_M", "Q6_K", "Q8_0", "F16", "BF16"} <= set(mix.QUANTS)
    assert mix.file_type("Q4_K_M") == 15
    assert mix.parse_quants("q8_0, Q4_K,q8_0") == ("Q8_0", "Q4_K_M")
    few_bits = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}
    for quant in mix.QUANTS:
        mix.check_imatrix(quant, has_imatrix=True)
        with pytest.raises(UsageError, match="too few bits") if quant in few_bits else nullcontext():
            mix.check_imatrix(quant, has_imatrix=False)
    with pytest.raises(UsageError, match="'Q9_K' is not a type") as caught:
        mix.parse_quant("Q9_K")
    assert "Q4_K_M" in caught.value.hint


def model(folder: Path, rows: int = 96) -> Path:
    random = np.random.default_rng(1)
    wide = random.standard_normal((rows, 256)).astype(np.float32)
    return write(
        folder / "model.gguf",
        {
            "token_embd.weight": random.standard_normal((40, 256)).astype(np.float16),
            "blk.0.attn_v.weight": (wide.view(np.uint32) >> 16).astype(np.uint16),
            "blk.0.ffn_down.weight": random.standard_normal((256, 32)).astype(np.float32),
            "blk.0.attn_norm.weight": np.ones(256, np.float32),
        },
    )


def test_a_file_is_quantised_with_its_mix_and_told_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "_BLOCK_VALUES", 2048)  # many blocks for each tensor
    source, target = model(tmp_path), tmp_path / "out.gguf"
    changes = {"ollama_forge.version": value_of("1"), "general.name": value_of("x")}
    assert quantise.quantise(source, target, "Q4_K_M", changes) == quantise.EMBEDDED
    found = read_gguf(target)
    types = {tensor.name: tensor.type for tensor in found.tensors}
    assert types == {
        "token_embd.weight": Type.Q6_K,  # tied
        "blk.0.attn_v.weight": Type.Q6_K,
        "blk.0.ffn_down.weight": Type.Q8_0,
        "blk.0.attn_norm.weight": Type.F32,
    }
    assert (found.get("general.file_type"), found.get("general.quantization_version")) == (15, 2)
    assert (found.get("ollama_forge.version"), found.get("general.name")) == ("1", "x")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for name, kind in types.items():
        before = theirs[name]
        values = before.data if before.tensor_type != Type.BF16 else gguf.quants.dequantize(before.data, Type.BF16)
        after = gguf.quants.dequantize(held(target, name), kind).reshape(values.shape)
        assert np.abs(after - values).max() < 0.2, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out.gguf"]


def test_plain_types(tmp_path: Path) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    quantise.quantise(source, target, "BF16", NOTHING)
    found = read_gguf(target)
    assert {tensor.type for tensor in found.tensors if "norm" not in tensor.name} == {Type.BF16}
    assert found.get("general.file_type") == mix.file_type("BF16")
    assert np.array_equal(held(target, "blk.0.attn_v.weight"), held(source, "blk.0.attn_v.weight"))


def fake_tool(folder: Path, body: str) -> str:
    """A llama-quantize whose ``body`` knows ``source``, ``target`` and ``quant``."""
    tool = folder / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nsource, target, quant = sys.argv[1:4]\n{body}\n", encoding="utf-8"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return str(tool)


def test_another_program_called_quantize_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Path(fake_tool(tmp_path, ""))
    monkeypatch.setenv("PATH", str(tool.parent))
    assert quantise.find_tool() == str(tool)
    tool.rename(tool.with_name("quantize"))
    assert quantise.find_tool() is None


def test_the_tool_on_path_is_used_and_its_file_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    ready = tmp_path / "ready.gguf"
    file = read_gguf(source)
    quantise.rewrite(file, ready, {t.name: t.type for t in file.tensors}, {"made.by": value_of("the tool")})
    tool = fake_tool(tmp_path, f"import shutil; assert quant == 'Q5_K_S'; shutil.copy({str(ready)!r}, target)")
    monkeypatch.setenv("PATH", str(Path(tool).parent))
    assert quantise.find_tool() == tool
    made_by = quantise.quantise(source, target, "Q5_K_S", {"ollama_forge.x": value_of("y")}, quantise.find_tool())
    assert made_by == "llama-quantize"
    found = read_gguf(target)
    assert (found.get("made.by"), found.get("ollama_forge.x")) == ("the tool", "y")
    assert found.get("general.file_type") == mix.file_type("Q5_K_S")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.gguf"]


@pytest.mark.parametrize(
    "body",
    ["sys.exit(3)", "open(target, 'wb').write(b'GGUF')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
    ids=["fails", "cut short", "killed"],
)
def test_where_the_tool_fails_the_embedded_one_takes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    tool = fake_tool(tmp_path, body)
    assert quantise.quantise(source, target, "Q4_0", NOTHING, tool) == quantise.EMBEDDED
    assert "using the embedded quantiser" in capsys.readouterr().err
    assert read_gguf(target).get("general.file_type") == mix.file_type("Q4_0")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.gguf"]


def test_a_tool_left_running_by_a_killed_run_writes_to_no_file_of_the_next(tmp_path: Path) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    left = tmp_path / "out.gguf.tool.partial"
    with left.open("wb") as of_killed:
        file = read_gguf(source)
        ready = tmp_path / "ready.gguf"
        quantise.rewrite(file, ready, {t.name: t.type for t in file.tensors}, {})
        tool = fake_tool(tmp_path, f"import shutil; shutil.copyfile({str(ready)!r}, target)")
        assert quantise.quantise(source, target, "Q5_K_S", NOTHING, tool) == "llama-quantize"
        assert os.fstat(of_killed.fileno()).st_size == 0
    assert not left.exists()


def nothing_broken(folder: Path, before: bytes) -> None:
    assert sorted(path.name for path in folder.glob("out*")) == ["out.gguf"]
    assert (folder / "out.gguf").read_bytes() == before


def test_a_quantised_file_is_quantised_again(tmp_path: Path) -> None:
    source, first, second = model(tmp_path), tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantise.quantise(source, first, "Q4_K_M", NOTHING)
    quantise.quantise(first, second, "Q8_0", NOTHING, tool="/a/tool/that/is/not/called")
    before, after = read_gguf(first), read_gguf(second)
    assert {tensor.type for tensor in after.tensors} == {Type.Q8_0, Type.F32}
    for tensor in before.tensors:
        old = gguf.quants.dequantize(held(first, tensor.name), tensor.type)
        kept = next(t.type for t in after.tensors if t.name == tensor.name)
        assert np.abs(gguf.quants.dequantize(held(second, tensor.name), kept) - old).max() <= 0.01 * np.abs(old).max()
    assert after.get("general.file_type") == mix.file_type("Q8_0")


def test_a_split_file_becomes_one(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    values = {f"blk.{n}.attn_q.weight": np.full((4, 256), n + 1, np.float32) for n in range(3)}
    for name, rows in values.items():
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target = tmp_path / "out.gguf"
    quantise.quantise(tmp_path / "model-00001-of-00002.gguf", target, "Q8_0", NOTHING)
    assert not [key for key in read_gguf(target).metadata if key.startswith("split.")]
    for name, rows in values.items():
        assert np.allclose(gguf.quants.dequantize(held(target, name), Type.Q8_0), rows, rtol=0.01)


def test_experts_of_mxfp4_stay_as_they_are(tmp_path: Path) -> None:
    experts = Tensor("blk.0.ffn_up_exps.weight", (256, 64, 4), Type.MXFP4)
    counts = Tensor("blk.0.counts.weight", (256, 2), Type.I32)
    others = Tensor("blk.0.attn_q.weight", (256, 64), Type.Q4_K)
    types = mix.tensor_types("Q6_K", mix.ModelProperties("llama", 1, 1, 4, False), [experts, counts, others])
    assert [types[tensor.name] for tensor in (experts, counts, others)] == [Type.MXFP4, Type.I32, Type.Q6_K]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    rows = np.ones((4, 256), np.float32)
    rows[2, 5] = np.nan
    source, target = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": rows}), tmp_path / "out.gguf"
    target.write_bytes(b"earlier")
    with pytest.raises(ForgeError, match=r"blk\.0\.attn_q\.weight: NaN"):
        quantise.quantise(source, target, "Q4_K_M", NOTHING)
    nothing_broken(tmp_path, b"earlier")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    target.write_bytes(b"earlier")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_io, "reserve", full)
    with pytest.raises(ForgeError, match="No space left") as caught:
        quantise.quantise(source, target, "Q4_K_M", NOTHING)
    assert "disk space" in caught.value.hint
    nothing_broken(tmp_path, b"earlier")


def test_a_full_disk_noticed_by_a_thread(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    source = read_gguf(model(tmp_path))
    tensor = source.tensors[0]
    jobs = list(quantise._jobs(tensor, Tensor(tensor.name, tensor.shape, Type.Q8_0), None))
    with pytest.raises(ForgeError, match=r"cannot quantise .*(No space left|seek)"):
        quantise._encode_all(source, Path("/dev/full"), jobs, lambda _: None)


def test_a_source_cut_short(tmp_path: Path) -> None:
    source, target = model(tmp_path), tmp_path / "out.gguf"
    target.write_bytes(b"earlier")
    source.write_bytes(source.read_bytes()[:-4000])
    with pytest.raises(ForgeError, match="truncated"):
        quantise.quantise(source, target, "Q4_K_M", NOTHING)
    nothing_broken(tmp_path, b"earlier")

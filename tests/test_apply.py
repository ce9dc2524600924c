"""``apply`` on files: storage types, MXFP4 experts, shards, and damaged files."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.mxfp4 import decode_mxfp4
from ollama_forge.checkpoints.storage import tensor_bytes
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import checkpoint_folder
from ollama_forge.edits.checkpoint_folder import PROVENANCE, edit_file_path
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny

R = tiny.unit_vector(7)


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    RefusalDirection(R.unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


def test_bf16_rounds_once(tmp_path: Path, refusal: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    apply(str(source.folder), tmp_path / "kept", refusal_pt=refusal, out_dtype="keep")
    apply(str(source.folder), tmp_path / "bf16", refusal_pt=refusal, out_dtype="bf16")
    kept, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    for name, tensor in rounded.items():
        assert torch.equal(tensor, kept[name].bfloat16()), name


def test_shards_stay_shards(tmp_path: Path, refusal: Path) -> None:
    source = tiny.save(tiny.build("qwen2"), tmp_path / "model", max_shard_size="30KB")
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, out_dtype="keep")
    written = Checkpoint(tmp_path / "edited", "edited", "folder")
    assert len(written.tensors.shards) == len(source.tensors.shards) > 2
    index = read_json(tmp_path / "edited" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(source.tensors)
    ChatModel.load(written, LoadSettings(dtype="float32", device="cpu"))


def test_provenance_card_and_factors(tmp_path: Path, refusal: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    _, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, out_dtype="keep")
    record = read_json(tmp_path / "edited" / PROVENANCE)
    assert set(record["changed"]) == applied.changed
    assert str(tmp_path) not in json.dumps(record)
    assert all(entry["relative_change"] > 0 for entry in record["changed"].values())
    assert "licence of the base model" in (tmp_path / "edited" / "README.md").read_text(encoding="utf-8")
    edit = EditRecord.load(edit_file_path(tmp_path / "edited"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "edited"))
    for name, made in edit.matrices.items():
        plain = before[name] - made.strength * made.L @ made.K.T
        axis = 0 if made.rescale.value == "columns" else 1
        scaled = plain * (before[name].norm(dim=axis, keepdim=True) / plain.norm(dim=axis, keepdim=True))
        torch.testing.assert_close(after[name], scaled, rtol=1e-4, atol=1e-5)
        hashes = [f"blake3:{blake3(tensor_bytes(side[name])).hexdigest()}" for side in (before, after)]
        assert [made.source_hash, made.result_hash] == hashes


def packed_gpt_oss(folder: Path) -> Checkpoint:
    """A tiny gpt-oss whose experts are stored as MXFP4."""
    tiny.save(tiny.build("gpt_oss"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Checkpoint(folder, "gpt-oss", "folder")


def decoded(source: Checkpoint, name: str) -> torch.Tensor:
    tensors = load_file(source.folder / "model.safetensors")
    return decode_mxfp4(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).transpose(1, 2)


def test_mxfp4_experts_stay_packed_where_they_are_not_edited(tmp_path: Path, refusal: Path) -> None:
    source = packed_gpt_oss(tmp_path / "model")
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, out_dtype="keep")
    after = Checkpoint(tmp_path / "edited", "edited", "folder")
    for name in source.tensors:
        if "experts" in name:
            assert source.tensors.read_bytes(name) == after.tensors.read_bytes(name)
    assert "quantization_config" in after.config


@pytest.mark.parametrize(
    ("out_dtype", "targets"), [("auto", ("attention",)), ("bf16", ("attention",)), ("auto", ("writers",))]
)
def test_mxfp4_experts_are_decoded_where_they_must_be(
    tmp_path: Path, refusal: Path, out_dtype: str, targets: tuple[str, ...]
) -> None:
    source = packed_gpt_oss(tmp_path / "model")
    settings = EditSettings(targets=targets, norm_preserving=False)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=settings, out_dtype=out_dtype)
    after = load_file(tmp_path / "edited" / "model.safetensors")
    assert not [name for name in after if name.endswith(("_blocks", "_scales"))]
    assert "quantization_config" not in read_json(tmp_path / "edited" / "config.json")
    name = "model.layers.1.mlp.experts.down_proj"
    wanted = decoded(source, name)
    if "writers" in targets:
        wanted = wanted - (wanted @ R).unsqueeze(-1) * R  # [experts, in, out]: the stream is the last axis
    assert torch.equal(after[name], wanted.bfloat16())
    untouched = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(after[untouched], decoded(source, untouched).bfloat16())
    ChatModel.load(Checkpoint(tmp_path / "edited", "e", "folder"), LoadSettings(dtype="float32", device="cpu"))


def test_damage_is_one_line_and_leaves_nothing(tmp_path: Path, refusal: Path) -> None:
    model = tiny.build("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("inf")  # type: ignore[union-attr, index]
    tiny.save(model, tmp_path / "inf")
    with pytest.raises(ForgeError, match="NaN or infinite"):
        apply(str(tmp_path / "inf"), tmp_path / "edited", refusal_pt=refusal)
    tiny.save(tiny.build("llama"), tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ForgeError, match="truncated"):
        apply(str(tmp_path / "short"), tmp_path / "edited", refusal_pt=refusal)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("edited")] == []


def test_a_direction_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    RefusalDirection(torch.ones(1, 48) / 48**0.5).save(tmp_path / "other.pt")
    with pytest.raises(ForgeError, match="another model"):
        apply(str(tmp_path / "model"), tmp_path / "edited", refusal_pt=tmp_path / "other.pt")


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    tiny.save(tiny.build("llama"), tmp_path / "model")
    monkeypatch.setattr(checkpoint_folder, "free_space", lambda folder: 10)
    with pytest.raises(ForgeError, match="are free"):
        apply(str(tmp_path / "model"), tmp_path / "edited", refusal_pt=refusal)
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize("call", ["checkpoints.writer.copy_range", "files.os.fdatasync", "files.os.fsync"])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    tmp_path: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ollama_forge.{call}", full)
    with pytest.raises(ForgeError, match="No space left"):
        apply(str(tmp_path / "model"), tmp_path / "edited", refusal_pt=refusal, out_dtype="keep")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("edited")] == []


def test_wrong_usage(tmp_path: Path, refusal: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    with pytest.raises(UsageError, match="either"):
        apply(str(tmp_path / "model"), tmp_path / "edited")
    with pytest.raises(UsageError, match="out-dtype"):
        apply(str(tmp_path / "model"), tmp_path / "edited", refusal_pt=refusal, out_dtype="int3")
    with pytest.raises(ForgeError, match="leave none"):
        apply(
            str(tmp_path / "model"), tmp_path / "edited", refusal_pt=refusal, settings=EditSettings(skip_begin_layers=9)
        )
    with pytest.raises(UsageError, match="something else"):
        apply(str(tmp_path / "model"), tmp_path, refusal_pt=refusal)


def test_kernels_and_own_strengths(tmp_path: Path, refusal: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    strengths = {}
    for kernel in ("constant", "linear-peak", "gaussian"):
        settings = EditSettings(
            targets=("writers",), strength_kernel=kernel, skip_begin_layers=0, skip_end_layers=0, mlp_strength=0.5
        )
        apply(str(source.folder), tmp_path / kernel, refusal_pt=refusal, settings=settings)
        made = EditRecord.load(edit_file_path(tmp_path / kernel)).matrices
        strengths[kernel] = [made[f"model.layers.{layer}.self_attn.o_proj.weight"].strength for layer in range(4)]
        assert made["model.layers.2.mlp.down_proj.weight"].strength == 0.5
    assert strengths["constant"] == [1.0] * 4
    for kernel in ("linear-peak", "gaussian"):
        first, second, peak, last = strengths[kernel]
        assert peak == 1.0
        assert 0 < first < second == last < 1

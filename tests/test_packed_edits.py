"""Packed checkpoints of learned architectures, from the certificate's measurement to the written folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from ollama_forge.api import apply, compute_dir
from ollama_forge.architectures.certificate.certificate import EditKind, Tier
from ollama_forge.architectures.certificate.certify import certify
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.quantised import quantisation_entry
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.certify import full_edit
from ollama_forge.edits.checkpoint_folder import write_decoded
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.proven import examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.verify import verify
from ollama_forge.export.plan import ExportSettings, plan_export
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.loading import load_module
from ollama_forge.pipeline import gguf_stages, run
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.sources.resolve import resolve
from tests import families, tiny
from tests.packed import fp8_config, fp8_parts, mark, pack_fp8
from tests.test_apply import packed_gpt_oss
from tests.test_export_convert import byte_pairs
from tests.test_export_run import settings as run_settings

CPU = torch.device("cpu")
ALL = EditSettings(targets=("attention", "mlp", "embedding"))
ROUNDOFF = {"FP8": 2.0**-4, "MXFP4": 2.0**-2}  # half the distance of neighbours, relative to the smaller one


def is_linear(name: str) -> bool:
    """Whether FP8 releases pack this tensor of a model with ``..._proj`` layers."""
    return name.endswith("_proj.weight") or "kv_a_proj" in name


def qwen3_moe(folder: Path, dtype: torch.dtype) -> Checkpoint:
    tiny.save(families.build("qwen3_moe").to(dtype), folder)
    pack_fp8(folder, "block", is_linear)
    return resolve(str(folder))


def deepseek_v3(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Blocks of 128 x 128, the last ones ragged; one layer beyond the depth, which predicts a second token."""
    sizes: dict[str, Any] = {
        **families.FAMILIES["deepseek_v3"]().to_dict(), "hidden_size": 160, "intermediate_size": 200,
        "num_hidden_layers": 3, "quantization_config": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config.from_dict(sizes), dtype=dtype)
    tiny.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    last = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    tensors |= {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    tensors |= {"model.layers.3.eh_proj.weight": torch.randn(160, 320), "model.layers.3.hnorm.weight": torch.ones(160)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pack_fp8(folder, "block", is_linear, 128)
    return resolve(str(folder))


def stacks(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Experts in FP8 stacks ``[experts, out, in]``, as some releases store them, and the scales of an FP8 cache."""
    model = families.build("qwen3_moe").to(dtype)
    tiny.save(model, folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if ".experts." in name]:
        parts = [fp8_parts(matrix.float(), "block") for matrix in tensors[name]]
        tensors[name] = torch.stack([codes for codes, _ in parts])
        tensors[f"{name}_scale_inv"] = torch.stack([scales for _, scales in parts])
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mark(folder, fp8_config("block"))
    return resolve(str(folder))


def wrapper(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """The text model of a wrapper, with scales called ``scale`` and a ``quantization_config`` in the text config."""
    tiny.save(families.build("llava").to(dtype), folder)
    pack_fp8(folder, "block", lambda name: "language_model" in name and is_linear(name))
    path = folder / "model.safetensors"
    tensors = {name.replace("weight_scale_inv", "scale"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return resolve(str(folder))


def gpt_oss(folder: Path, dtype: torch.dtype) -> Checkpoint:
    return resolve(str(packed_gpt_oss(folder).folder))


MODELS: dict[str, Callable[[Path, torch.dtype], Checkpoint]] = {
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "stacks": stacks,
    "wrapper": wrapper,
}


def load(folder: Path) -> nn.Module:
    checkpoint = Checkpoint(folder, folder.name, "folder")
    return load_module(checkpoint, map_checkpoint(checkpoint), (CPU,), torch.float32).eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "stacks"])
def test_the_certificate_of_a_packed_model_holds_within_its_type_s_rounding(tmp_path: Path, family: str) -> None:
    """What a full edit leaves in the stream, and what readers still read, are as large as the reported leaks.

    A nudge or a component along the direction shrinks at least to the type's unit roundoff, as it would if every value
    were rounded to the nearest number with errors in the worst case all of one sign. Tensors that are not packed are
    float32, so that all that is left comes from the packed ones.
    """
    source = MODELS[family](tmp_path / "model", torch.float32)
    leaks: dict[EditKind, list[float]] = {kind: [] for kind in EditKind}
    forms: set[str] = set()

    def edit(checkpoint: Checkpoint, model_map: ModelMap, r: Tensor, kind: EditKind, folder: Path) -> None:
        full_edit(checkpoint, model_map, r, kind, folder)
        changed = read_json(folder / "abliteration.json")["changed"].values()
        leaks[kind] += [matrix["leak"] for matrix in changed if "leak" in matrix]
        forms.update(matrix["stored_as"] for matrix in changed if "leak" in matrix)

    ids = torch.randint(60, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    twin = Twin(load(source.folder), source.config, {"input_ids": ids, "use_cache": False})
    found = certify(twin, source, map_checkpoint(source), edit, load)
    assert found.obstacles == ()
    roundoff = ROUNDOFF[forms.pop()]
    for kind, measured in ((EditKind.WRITERS, found.writers), (EditKind.READERS, found.readers)):
        assert len(measured) >= source.config["num_hidden_layers"]
        left = max(leak.after / leak.before for leak in measured)
        if not leaks[kind]:
            assert left < 1e-4  # no packed matrix
            continue
        assert max(leaks[kind]) < roundoff
        assert median(leaks[kind]) / 10 < left < min(roundoff, 4 * max(leaks[kind]))


@pytest.mark.parametrize("family", MODELS)
def test_packed_models_from_map_to_verified_folder(tmp_path: Path, family: str) -> None:
    source = MODELS[family](tmp_path / "model", torch.bfloat16)
    examined = examine(source)
    assert examined.tier is Tier.PROVEN
    d = examined.model_map.d_model
    direction = RefusalDirection(tiny.unit_vector(7, d).unsqueeze(0), layer=2)
    direction.save(tmp_path / "refusal.pt")
    plan = plan_orthogonal(examined.model_map, direction, ALL, vector_reader(source.tensors))
    shards = set()
    for out_dtype in ("keep", "auto", "bf16"):
        written, applied = apply(
            source.label, tmp_path / out_dtype, refusal_pt=tmp_path / "refusal.pt", settings=ALL, out_dtype=out_dtype
        )
        assert set(written.tensors.shapes) == set(source.tensors.shapes)
        assert bool(written.tensors.packed) == bool(quantisation_entry(written.config)) == (out_dtype == "keep")
        assert bool(applied.leaks) == (out_dtype == "keep")
        card = (written.folder / "README.md").read_text(encoding="utf-8")
        assert (f"; rounding to it undid at most {max(applied.leaks.values(), default=0):.2%} of" in card) == (
            out_dtype == "keep"
        )
        scales = [name for name in source.tensors if name.endswith(("k_scale", "v_scale"))]
        assert [name in written.tensors for name in scales] == [out_dtype == "keep"] * len(scales)
        shard = (written.folder / "model.safetensors").read_bytes()
        if shard in shards:
            assert out_dtype == "bf16"  # all that is not packed is bf16 already
            continue
        shards.add(shard)
        model = ChatModel.load(written, LoadSettings(device="cpu", dtype="float32"))
        assert [check for check in verify(source, written, model, plan, direction) if not check.passed] == []


def test_least_squares_keeps_fp8(tmp_path: Path) -> None:
    source = qwen3_moe(tmp_path / "model", torch.bfloat16)
    for name, seed in (("harmful", 1), ("harmless", 2)):
        (tmp_path / f"{name}.txt").write_text("\n".join(tiny.lines(40, seed)), encoding="utf-8")
    prompts = PromptSettings(str(tmp_path / "harmful.txt"), str(tmp_path / "harmless.txt"), num_instructions=16)
    settings = EditSettings("least-squares", targets=("writers",), norm_preserving=False)
    on_cpu = LoadSettings(device="cpu", dtype="float32")
    computed = compute_dir(source.label, tmp_path / "refusal.pt", prompts=prompts, load=on_cpu, edit=settings)
    assert computed.edit_path is not None
    written, applied = apply(source.label, tmp_path / "edited", edit_file=computed.edit_path, out_dtype="keep")
    plan = EditRecord.load(computed.edit_path).plan(map_checkpoint(source), source.fingerprint)
    assert set(applied.packed_as) <= set(plan.edits)
    assert len(applied.packed_as) > 15
    for name, leak in applied.leaks.items():
        before, after = (made.tensors.read_packed(name).decode() for made in (source, written))
        factors = plan.edits[name].rule.factors(before, None)
        edit = factors.L @ factors.K.T
        lost = torch.linalg.qr(factors.L).Q.T @ (after - (before - edit))
        assert float(lost.norm() / edit.norm()) == pytest.approx(leak, rel=0.02, abs=1e-5), name
        assert leak < ROUNDOFF["FP8"]
    model = ChatModel.load(written, on_cpu)
    checks = verify(source, written, model, plan, computed.direction)
    assert [check for check in checks if not check.passed] == []


def test_a_packed_checkpoint_is_decoded_for_the_gguf_file(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "model", torch.bfloat16)
    settings = ExportSettings()
    made = plan_export(source, "x", tmp_path / "out", settings)
    kept = plan_export(source, "x", tmp_path / "out", settings, keeps_packed=True)
    assert not made.decodes
    assert kept.decodes
    assert not [note for note in made.notes if "MXFP4" in note]
    if not kept.problem:
        assert any("MXFP4" in note and "bf16 copy" in note for note in kept.notes)
        assert kept.disk_space == made.disk_space + 2 * source.parameters
    write_decoded(source, tmp_path / "decoded")
    decoded = Checkpoint(tmp_path / "decoded", "decoded", "folder")
    assert not decoded.tensors.packed
    assert quantisation_entry(decoded.config) is None
    assert dict(decoded.tensors.shapes) == dict(source.tensors.shapes)


def test_a_run_that_keeps_fp8_gives_the_converter_a_decoded_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.build("llama").bfloat16()
    model.resize_token_embeddings(tiny.VOCABULARY + 1)  # type: ignore[operator]
    tiny.save(model, tmp_path / "model")
    byte_pairs((("t", "h"),)).save_pretrained(tmp_path / "model")
    pack_fp8(tmp_path / "model", "channel", is_linear)
    given: list[tuple[bool, bool]] = []

    def convert(folder: Path, checkpoint: Checkpoint, *_: Any, **__: Any) -> None:
        given.append((bool(checkpoint.tensors.packed), (checkpoint.folder / "tokenizer.json").is_file()))
        raise ForgeError("seen", "")

    monkeypatch.setattr(gguf_stages, "convert", convert)
    made = run_settings(tmp_path, tmp_path / "model", evaluate=False, verify=False)
    with pytest.raises(ForgeError, match="seen"):
        run(made)
    assert given == [(False, True)]
    assert "the checkpoint keeps its FP8 tensors; the GGUF file is made of a bf16 copy" in capsys.readouterr().err
    assert Checkpoint(made.folder / "checkpoint", "edited", "folder").tensors.packed
    assert not list(made.folder.rglob("decoded"))

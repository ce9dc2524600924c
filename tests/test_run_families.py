"""Models with experts, latent and linear attention through the commands, from the direction to the verified weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply, compute_dir
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify import verify
from ollama_forge.evaluation.verify.running import observe
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.prompts.settings import PromptSettings
from tests import families, planted

ALL = EditSettings(
    targets=("attention", "writers", "mlp", "embedding"), skip_begin_layers=0, skip_end_layers=0, norm_preserving=False
)
LOAD = LoadSettings(device="cpu", dtype="float32")
ADDED = "writers add nothing along the direction"


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> PromptSettings:
    harmful, harmless = planted.write_lists(tmp_path_factory.mktemp("lists"))
    return PromptSettings(harmful=str(harmful), harmless=str(harmless), num_instructions=8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A family's checkpoint with a tokenizer of words, which llama.cpp cannot read, so that no GGUF file is made."""
    root, saved = tmp_path_factory.mktemp("families"), dict[str, Checkpoint]()

    def get(family: str) -> Checkpoint:
        if family not in saved:
            saved[family] = families.save(family, root / family)
            planted.tokenizer().save_pretrained(root / family)
        return saved[family]

    return get


def planned(source: Checkpoint, direction_file: Path) -> tuple[EditPlan, RefusalDirection, ChatModel]:
    """The plan of ``ALL``, its direction, and the source in memory."""
    model = ChatModel.load(source, LOAD)
    direction = RefusalDirection.load(direction_file, model.model_map.d_model, model.model_map.n_layers)
    return plan_orthogonal(model.model_map, direction, ALL, vector_reader(source.tensors)), direction, model


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "bloom"])
def test_every_matrix_is_edited_and_verified(
    family: str, sources: Callable[[str], Checkpoint], lists: PromptSettings, tmp_path: Path
) -> None:
    source = sources(family)
    computed = compute_dir(str(source.folder), tmp_path / "r.pt", prompts=lists, load=LOAD)
    result, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=computed.path, settings=ALL)
    plan, direction, _ = planned(source, computed.path)
    assert applied.changed == plan.changed_tensors
    written = ChatModel.load(result, LOAD)
    checks = verify(source, result, written, plan, direction)
    assert len(checks) == 5
    assert all(check.passed for check in checks), checks

    writers = [edit.matrix for edit in plan.edits.values() if edit.matrix.writes and edit.matrix.layer is not None]
    missed = next((matrix for matrix in writers if matrix.is_expert), writers[0])
    tensors = load_file(result.folder / "model.safetensors")
    tensors[missed.tensor] = load_file(source.folder / "model.safetensors")[missed.tensor]
    save_file(tensors, result.folder / "model.safetensors", metadata={"format": "pt"})
    checks = verify(source, Checkpoint(result.folder, "damaged", "folder"), written, plan, direction)
    (added,) = (check for check in checks if check.name == ADDED)
    assert not added.passed
    assert added.where.startswith(missed.tensor)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_judged_on_what_is_routed_to_them(family: str, sources: Callable[[str], Checkpoint]) -> None:
    model = ChatModel.load(sources(family), LOAD)
    writers = [matrix for matrix in model.model_map.writers if matrix.is_expert]
    finite, seen = observe(model, writers)
    assert finite.passed
    experts = sum(matrix.shape[0] if matrix.experts else 1 for matrix in writers)
    assert experts // 2 < len(seen) <= experts
    assert all(1 <= len(rows) <= 4 and bool(rows.any(-1).all()) for rows in seen.values())
    assert not any(torch.equal(rows, other) for rows in seen.values() for other in seen.values() if rows is not other)


@pytest.mark.parametrize("family", ["qwen3_moe", "jamba"])
def test_least_squares_by_steps(
    family: str, sources: Callable[[str], Checkpoint], lists: PromptSettings, tmp_path: Path
) -> None:
    source = sources(family)
    edit = EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False)
    computed = compute_dir(str(source.folder), tmp_path / "r.pt", prompts=lists, load=LOAD, edit=edit)
    assert computed.edit_path is not None
    _, applied = apply(str(source.folder), tmp_path / "edited", edit_file=computed.edit_path)
    writers = [m for m in planned(source, computed.path)[2].model_map.writers if m.layer in (1, 2, 3)]
    assert applied.changed == {matrix.tensor for matrix in writers}


def test_a_run_edits_every_expert_and_its_records_stay_short(
    sources: Callable[[str], Checkpoint], lists: PromptSettings, tmp_path: Path
) -> None:
    settings = RunSettings(
        model=str(sources("qwen3_moe").folder),
        name="org/experts",
        output_dir=str(tmp_path / "out"),
        prompts=replace(lists, max_measured=8),
        load=LOAD,
        edit=replace(ALL, targets=("writers",)),
        allow_few_refusals=True,
    )
    report = run(settings)
    assert report.verified
    assert "WordLevel" in report.file_problem
    folder = tmp_path / "out" / "checkpoint"
    record = read_json(folder / "abliteration.json")
    names = ("self_attn.o_proj", "mlp.experts.N.down_proj")
    assert set(record["changed"]) == {f"model.layers.{layer}.{name}.weight" for layer in range(5) for name in names}
    experts = record["changed"]["model.layers.2.mlp.experts.N.down_proj.weight"]
    assert (experts["strength"], experts["experts"]) == (1.0, 6)
    assert 0.05 < experts["relative_change"] < 0.3  # a direction of 48
    assert record["skipped"]["model.layers.2.mlp.experts.N.up_proj.weight"] == "role up is not in targets writers"
    assert "35 matrices changed" in (folder / "README.md").read_text(encoding="utf-8")
    assert len(json.dumps(record["skipped"])) < 5000

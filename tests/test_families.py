"""Many families end to end: learned, edited from files in the Hub's spelling, judged by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_class import auto_class
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from tests import families

ALL_WRITERS = EditSettings(targets=("writers", "embedding"), skip_begin_layers=0, skip_end_layers=0)
Change = Callable[[ModelMap], ModelMap]


def direction_of(model_map: ModelMap) -> RefusalDirection:
    vector = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(4))
    return RefusalDirection((vector / vector.norm()).unsqueeze(0), layer=2)


def largest_component(folder: Path, config: dict[str, Any], r: Tensor) -> float:
    """The largest ``|r.h| / |h|`` of the hidden states in front of the final norm, as the class itself returns them."""
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[:-1]
    assert len(states) > 1
    return max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in states)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root, saved = tmp_path_factory.mktemp("families"), dict[str, Checkpoint]()

    def get(family: str) -> Checkpoint:
        if family not in saved:
            saved[family] = families.save(family, root / family)
        return saved[family]

    return get


def edit(source: Checkpoint, model_map: ModelMap, folder: Path, strength: float = 1.0) -> EditPlan:
    direction = direction_of(model_map)
    settings = replace(ALL_WRITERS, strength=strength)
    plan = plan_orthogonal(model_map, direction, settings, vector_reader(source.tensors))
    write_checkpoint(source, model_map, plan, folder, settings=settings, out_dtype="keep", direction=direction)
    return plan


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_component_is_left_and_all_else_is_untouched(
    family: str, sources: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = sources(family)
    model_map = map_checkpoint(source)
    plan = edit(source, model_map, tmp_path / "edited")
    r = direction_of(model_map).vectors[0]
    assert largest_component(source.folder, dict(source.config), r) > 0.05
    assert largest_component(tmp_path / "edited", dict(source.config), r) < 1e-5
    result = Checkpoint(tmp_path / "edited", "edited", "folder")
    assert set(result.tensors) == set(source.tensors)
    changed = {n for n in source.tensors if source.tensors.read_bytes(n) != result.tensors.read_bytes(n)}
    assert changed == plan.changed_tensors
    assert not {name for name in changed if name.startswith(("vision", "model.vision", "multi_modal"))}


@pytest.mark.parametrize(
    ("family", "gates", "ups"),
    [("mixtral", "w1", "w3"), ("qwen3_moe", "gate_proj", "up_proj"), ("jamba", "gate_proj", "up_proj")],
)
def test_an_experts_gate_and_up_have_their_own_roles(
    family: str, gates: str, ups: str, sources: Callable[[str], Checkpoint]
) -> None:
    """They are one matrix in memory."""
    experts = [matrix for matrix in map_checkpoint(sources(family)).matrices if matrix.expert is not None]
    found = {matrix.tensor.split(".")[-2]: matrix.role for matrix in experts}
    assert (found.pop(gates), found.pop(ups)) == (Role.GATE, Role.UP)
    assert set(found.values()) == {Role.DOWN}


def only(change: Callable[[Matrix], Matrix | None], wanted: Callable[[Matrix], bool]) -> Change:
    """Change the matrices that are wanted; None leaves a matrix out."""

    def apply(model_map: ModelMap) -> ModelMap:
        if not any(map(wanted, model_map.matrices)):
            pytest.skip("nothing to change")
        new = [change(matrix) if wanted(matrix) else matrix for matrix in model_map.matrices]
        return replace(model_map, matrices=tuple(matrix for matrix in new if matrix is not None))

    return apply


def is_writer(matrix: Matrix) -> bool:
    return matrix.writes and matrix.layer is not None


MUTATIONS: dict[str, Change] = {
    "dropped gain": only(lambda m: replace(m, post_norms=()), lambda m: bool(m.post_norms)),
    "skipped layer": only(lambda m: None, lambda m: is_writer(m) and m.layer == 2),
    "missed attention output": only(lambda m: None, lambda m: m.role is Role.O),
    "missed mlp output": only(lambda m: None, lambda m: m.role is Role.DOWN),
    "missed last expert": only(lambda m: None, lambda m: m.expert == 5),
    "missed shared expert": only(
        lambda m: None, lambda m: m.role is Role.DOWN and m.expert is None and not m.experts and "shared" in m.tensor
    ),
    "missed embedding": only(lambda m: None, lambda m: m.rows_are_written),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_mutation_of_the_map_leaves_a_component(
    family: str, mutation: str, sources: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = sources(family)
    model_map = map_checkpoint(source)
    edit(source, MUTATIONS[mutation](model_map), tmp_path / "edited")
    r = direction_of(model_map).vectors[0]
    assert largest_component(tmp_path / "edited", dict(source.config), r) > 1e-4


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_flipped_sign_leaves_a_component(family: str, sources: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    source = sources(family)
    model_map = map_checkpoint(source)
    edit(source, model_map, tmp_path / "edited", strength=-1.0)
    assert largest_component(tmp_path / "edited", dict(source.config), direction_of(model_map).vectors[0]) > 0.05

"""Verification of edited GGUF files: honest edits of each type pass, and every kind of damage is found."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import read_gguf, value_of, write_header
from ollama_forge.checkpoints.gguf.types import can_encode
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.gguf_output import write_gguf
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.proven import examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify import verify
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny
from tests.gguf_models import D, Model

CPU = LoadSettings(device="cpu", dtype="float32")
EDITED = "edited matrices and biases are the planned edit, rounded once"
OTHERS = "all other tensors are the source's"
TYPES = [kind for kind in Type if can_encode(kind) and not kind.name.startswith(("IQ1", "IQ2"))]  # slow to encode
EMBEDDING, DOWN, OTHER = "token_embd.weight", "blk.1.ffn_down.weight", "blk.1.attn_norm.weight"


def settings_of(strength: float = 1.0, *, norm_preserving: bool = False) -> EditSettings:
    targets = ("attention", "mlp", "embedding")
    return EditSettings(
        targets=targets, strength=strength, skip_begin_layers=0, skip_end_layers=0, norm_preserving=norm_preserving
    )


def planned(source: GgufCheckpoint, seed: int, settings: EditSettings) -> tuple[EditPlan, RefusalDirection]:
    direction = RefusalDirection(tiny.unit_vector(seed, D).unsqueeze(0), layer=1)
    return plan_orthogonal(examine(source).model_map, direction, settings, vector_reader(source.tensors)), direction


def write(source: GgufCheckpoint, plan: EditPlan, target: Path, settings: EditSettings) -> GgufCheckpoint:
    write_gguf(source, examine(source).model_map, plan, target, settings=settings)
    return source.with_file(target)


def failures(
    source: GgufCheckpoint, written: GgufCheckpoint, plan: EditPlan, direction: RefusalDirection
) -> dict[str, str]:
    model = ChatModel.load(written, CPU)
    return {check.name: check.where for check in verify(source, written, model, plan, direction) if not check.passed}


@pytest.mark.parametrize(("family", "seed"), [("gpt2", 0), ("gpt2", 1), ("gpt2", 2), ("qwen3_moe", 3)])
def test_honest_edits_pass(family: str, seed: int, gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    kinds = itertools.cycle(TYPES[seed % len(TYPES) :] + TYPES)
    source = gguf_models[family].with_types(tmp_path / "source.gguf", lambda _: next(kinds))
    settings = settings_of((1.0, 0.5, -0.5, 0.1)[seed], norm_preserving=seed % 2 == 0)
    plan, direction = planned(source, seed, settings)
    written = write(source, plan, tmp_path / "edited.gguf", settings)
    assert failures(source, written, plan, direction) == {}


def overwrite(path: Path, name: str, data: bytes) -> None:
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(data[: tensor.size])


def stored(path: Path, name: str) -> bytes:
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)
    return path.read_bytes()[tensor.start : tensor.start + tensor.size]


Damage = Callable[[GgufCheckpoint, EditPlan, Path], None]


def skip(name: str) -> Damage:
    def damage(source: GgufCheckpoint, _: EditPlan, target: Path) -> None:
        overwrite(target, name, stored(source.path, name))

    return damage


def another_plan(seed: int, strength: float) -> Damage:
    def damage(source: GgufCheckpoint, _: EditPlan, target: Path) -> None:
        settings = settings_of(strength)
        write(source, planned(source, seed, settings)[0], target, settings)

    return damage


def flip_bit(_: GgufCheckpoint, __: EditPlan, target: Path) -> None:
    data = bytearray(stored(target, OTHER))
    data[5] ^= 1
    overwrite(target, OTHER, bytes(data))


def with_metadata(change: Callable[[dict], dict]) -> Damage:  # type: ignore[type-arg]
    def damage(_: GgufCheckpoint, __: EditPlan, target: Path) -> None:
        file, data = read_gguf(target), {t.name: stored(target, t.name) for t in read_gguf(target).tensors}
        with target.open("wb", buffering=0) as out:
            for tensor in write_header(out, change(dict(file.metadata)), file.tensors):
                out.seek(tensor.start)
                out.write(data[tensor.name])

    return damage


OF_EDITS: dict[str, tuple[Damage, str]] = {
    "a skipped writer": (skip(DOWN), "transformer.h.1.mlp.c_proj.weight"),
    "a skipped embedding": (skip(EMBEDDING), "transformer.wte.weight"),
    "another direction": (another_plan(8, 1.0), ""),
    "half the strength": (another_plan(7, 0.5), ""),
    "the other sign": (another_plan(7, -1.0), ""),
}
OF_OTHERS: dict[str, tuple[Damage, str]] = {
    "a bit of another tensor": (flip_bit, OTHER),
    "a changed key": (with_metadata(lambda m: m | {"general.name": value_of("x")}), "general.name"),
    "a missing key": (with_metadata(lambda m: {k: m[k] for k in m if k != "general.name"}), "general.name"),
    "a key too many": (with_metadata(lambda m: m | {"x.y": value_of(1)}), "x.y"),
}
Honest = Callable[[Type], tuple[GgufCheckpoint, GgufCheckpoint, EditPlan, RefusalDirection]]


@pytest.fixture(scope="module")
def honest(gguf_models: Mapping[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Honest:
    """An honest edit of a file of one type."""
    folder = tmp_path_factory.mktemp("honest")

    @functools.cache
    def made(kind: Type) -> tuple[GgufCheckpoint, GgufCheckpoint, EditPlan, RefusalDirection]:
        source = gguf_models["gpt2"].with_types(folder / f"{kind.name}.gguf", lambda _: kind)
        plan, direction = planned(source, 7, settings_of())
        return source, write(source, plan, folder / f"{kind.name}-edited.gguf", settings_of()), plan, direction

    return made


def found_by(honest: Honest, kind: Type, damage: Damage, target: Path) -> dict[str, str]:
    source, written, plan, direction = honest(kind)
    shutil.copyfile(written.path, target)
    damage(source, plan, target)
    return failures(source, source.with_file(target), plan, direction)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_K, Type.Q2_K, Type.IQ3_S])
@pytest.mark.parametrize("what", OF_EDITS)
def test_a_wrong_edit_is_found(what: str, kind: Type, honest: Honest, tmp_path: Path) -> None:
    damage, where = OF_EDITS[what]
    assert where in found_by(honest, kind, damage, tmp_path / "damaged.gguf")[EDITED]


@pytest.mark.parametrize("what", OF_OTHERS)
def test_a_change_beside_the_edit_is_found(what: str, honest: Honest, tmp_path: Path) -> None:
    damage, where = OF_OTHERS[what]
    assert where in found_by(honest, Type.Q4_K, damage, tmp_path / "damaged.gguf")[OTHERS]

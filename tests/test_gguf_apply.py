"""Edited GGUF files: every type, permuted, fused, transposed and stacked matrices, in llama.cpp and in transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.checkpoints.gguf.types import can_encode
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.gguf_output import write_gguf
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.proven import examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify import verify
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llama_server
from tests.first_tokens import first_log_probs as of_model
from tests.gguf_models import FAMILIES, PROBES, Model, R
from tests.llamacpp_scores import first_log_probs

pytest.importorskip("xllamacpp")
WRITERS = EditSettings(targets=("writers", "embedding"), skip_begin_layers=0, skip_end_layers=0, norm_preserving=False)
ALL = EditSettings(targets=("attention", "mlp", "writers", "embedding"), skip_begin_layers=0, skip_end_layers=0)
DIRECTION = RefusalDirection(R.unsqueeze(0), layer=1)
CPU = LoadSettings(device="cpu", dtype="float32")
PROMPTS = [[60, 61, 62, 63], [90, 120, 70], [200]]
LETTER = 70
TYPES = [kind for kind in Type if can_encode(kind)]
LEAKS = {  # the largest leak of a full-strength edit of rows of 256 values, by bits per value
    "F32": 1e-6, "F16": 1e-5, "BF16": 1e-5, "Q8_0": 5e-4, "Q6_K": 2e-3, "Q5_K": 5e-3, "Q5_1": 5e-3, "Q5_0": 5e-3,
    "Q4_K": 0.02, "Q4_1": 0.01, "Q4_0": 0.01, "IQ4_NL": 0.01, "IQ4_XS": 0.01, "MXFP4": 0.01, "Q3_K": 0.03, "Q2_K": 0.05,
}  # fmt: skip
CODEBOOKS = 0.7  # the same for types with codebooks


def planned(source: GgufCheckpoint, settings: EditSettings) -> tuple[ModelMap, EditPlan]:
    model_map = examine(source).model_map
    return model_map, plan_orthogonal(model_map, DIRECTION, settings, vector_reader(source.tensors))


def edited(
    source: GgufCheckpoint, target: Path, settings: EditSettings
) -> tuple[GgufCheckpoint, EditPlan, AppliedEdit]:
    model_map, plan = planned(source, settings)
    applied = write_gguf(source, model_map, plan, target, settings=settings, direction=DIRECTION)
    return source.with_file(target), plan, applied


def raw(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a file."""
    data = path.read_bytes()
    return {tensor.name: data[tensor.start : tensor.start + tensor.size] for tensor in read_gguf(path).tensors}


def holders(source: GgufCheckpoint, plan: EditPlan) -> set[str]:
    """The tensors of the file that hold planned tensors."""
    parts = source.layout.parts
    return {name for name in parts if any(part.tensor in plan.changed_tensors for part in parts[name])}


def assert_only_planned_bytes_differ(source: GgufCheckpoint, written: GgufCheckpoint, plan: EditPlan) -> None:
    before, after = raw(source.path), raw(written.path)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == holders(source, plan)
    assert [t.type for t in source.file.tensors] == [t.type for t in written.file.tensors]
    kept = {key: value for key, value in written.file.metadata.items() if not key.startswith("ollama_forge.")}
    assert list(kept.items()) == list(source.file.metadata.items())


def assert_verified(source: GgufCheckpoint, written: GgufCheckpoint, plan: EditPlan, model: ChatModel) -> None:
    assert [check for check in verify(source, written, model, plan, DIRECTION) if not check.passed] == []


def log_probs_of(model: ChatModel) -> Tensor:
    return of_model(model, PROMPTS)


def log_probs_in_llamacpp(path: Path) -> Tensor:
    with llama_server(path, 64) as server:
        return first_log_probs(server, PROMPTS, LETTER)


def test_every_type(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    """Each type holds a writer; types with codebooks leave more than a little of the direction."""
    kinds = itertools.cycle(TYPES)
    source = gguf_models["llama"].with_types(
        tmp_path / "source.gguf",
        lambda tensor: next(kinds) if tensor.name.endswith(("attn_output.weight", "ffn_down.weight")) else tensor.type,
    )
    assert len(TYPES) == 23
    assert {tensor.type for tensor in source.file.tensors} == set(TYPES)
    written, plan, applied = edited(source, tmp_path / "edited.gguf", WRITERS)
    assert applied.changed == plan.changed_tensors == applied.leaks.keys()
    assert len(applied.changed) == 2 * 12 + 1
    assert_only_planned_bytes_differ(source, written, plan)
    assert written.path.stat().st_size < source.path.stat().st_size + 4096
    for name, leak in applied.leaks.items():
        assert leak < LEAKS.get(applied.packed_as[name], CODEBOOKS), (name, applied.packed_as[name])
    model = ChatModel.load(written, CPU)
    assert_verified(source, written, plan, model)
    before, after = log_probs_in_llamacpp(source.path), log_probs_in_llamacpp(written.path)
    assert (after - log_probs_of(model)).abs().max() < 0.15  # llama.cpp rounds activations to eight bits
    component = [(probs[:, PROBES[0]] - probs[:, PROBES[1]]).abs().max() for probs in (before, after)]
    assert component[1] < component[0] / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_direction_is_gone(family: str, gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    model = gguf_models[family]
    source = model.opened(model.path)
    written, plan, applied = edited(source, tmp_path / "edited.gguf", WRITERS)
    assert applied.changed == plan.changed_tensors
    assert_only_planned_bytes_differ(source, written, plan)
    loaded, original = ChatModel.load(written, CPU), ChatModel.load(source, CPU)
    assert_verified(source, written, plan, loaded)
    assert component_of_stream(original) > 0.01
    assert component_of_stream(loaded) < 1e-5
    after = log_probs_in_llamacpp(written.path)
    assert (after - log_probs_of(loaded)).abs().max() < 0.01  # llama.cpp keeps keys and values in F16
    assert (after - log_probs_of(original)).abs().max() > 0.01
    if not source.config["tie_word_embeddings"]:
        assert (after[:, PROBES[0]] - after[:, PROBES[1]]).abs().max() < 1e-3
        before = log_probs_of(original)
        assert (before[:, PROBES[0]] - before[:, PROBES[1]]).abs().max() > 0.1


def component_of_stream(model: ChatModel) -> float:
    """The largest component along the direction of the output of a layer, relative to the output's norm."""
    found: list[float] = []

    def look(_: Any, __: Any, output: Any) -> None:
        stream = (output[0] if isinstance(output, tuple) else output).double()
        found.append(float(((stream @ R.double()).abs() / stream.norm(dim=-1)).max()))

    handles = [model.layer(index).register_forward_hook(look) for index in range(model.model_map.n_layers)]
    log_probs_of(model)
    for handle in handles:
        handle.remove()
    assert len(found) >= model.model_map.n_layers
    return max(found)


@pytest.mark.parametrize(("family", "kind"), zip(FAMILIES, itertools.cycle([Type.Q4_K, Type.MXFP4, Type.Q8_0])))
def test_readers_too(family: str, kind: Type, gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    source = gguf_models[family].with_types(tmp_path / "source.gguf", lambda _: kind)
    written, plan, applied = edited(source, tmp_path / "edited.gguf", ALL)
    assert applied.changed == plan.changed_tensors
    assert_only_planned_bytes_differ(source, written, plan)
    assert_verified(source, written, plan, ChatModel.load(written, CPU))

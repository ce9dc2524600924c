"""Certificates of tiny models: correct maps are proven, and each wrong one fails where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ollama_forge.architectures.certificate.certificate import Certificate, EditKind, Tier
from ollama_forge.architectures.certificate.certify import READ, WRITTEN, Edit, certify
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.certify import full_edit, loader
from ollama_forge.edits.plan import select_matrices
from ollama_forge.edits.proven import Examined, with_proofs
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.records import from_json, to_json
from tests import families, tiny

WRITERS, READERS = EditKind.WRITERS, EditKind.READERS
Mutation = Callable[[Matrix], Matrix | None]


class Example:
    """A tiny model, saved, and its correct map."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.checkpoint = tiny.save(model, folder)
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
        self.twin = Twin(model, self.checkpoint.config, {"input_ids": ids, "use_cache": False})
        self.map = map_checkpoint(self.checkpoint)

    def certificate(self, model_map: ModelMap | None = None, edit: Edit = full_edit) -> Certificate:
        return certify(self.twin, self.checkpoint, model_map or self.map, edit, loader(self.twin))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Example]:
    @cache
    def make(family: str) -> Example:
        return Example(tiny.build(family), tmp_path_factory.mktemp("twin") / family)

    return make


def failing(certificate: Certificate) -> set[tuple[EditKind, int | None, str]]:
    return {(failure.kind, failure.layer, failure.module) for failure in certificate.failures}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_correct_maps_are_proven(example: Callable[[str], Example], family: str) -> None:
    certificate = example(family).certificate()
    assert certificate.tier is Tier.PROVEN, certificate.reasons
    assert [leak.layer for leak in certificate.writers] == [None, 0, 1, 2, 3]
    assert [leak.layer for leak in certificate.readers] == [0, 1, 2, 3]
    assert all(leak.after <= WRITTEN and leak.before > 0.1 for leak in certificate.writers)
    assert all(leak.after <= READ and leak.before > 0.1 for leak in certificate.readers)


def change_norm(**changes: Any) -> Mutation:
    return lambda matrix: replace(matrix, reads=replace(matrix.reads, **changes))


MUTATIONS: dict[str, tuple[str, str, Mutation, EditKind]] = {
    "axis of a square writer": (
        "llama",
        "model.layers.1.self_attn.o_proj",
        lambda m: replace(m, transposed=True),
        WRITERS,
    ),
    "axis of a square reader": (
        "llama",
        "model.layers.1.self_attn.q_proj",
        lambda m: replace(m, transposed=True),
        READERS,
    ),
    "axis of a square stack": (
        "gpt_oss",
        "model.layers.2.mlp.experts",
        lambda m: replace(m, transposed=False) if m.writes else m,
        WRITERS,
    ),
    "post-norm dropped": ("gemma2", "model.layers.2.mlp.down_proj", lambda m: replace(m, post_norms=()), WRITERS),
    "gain dropped": ("llama", "model.layers.0.mlp.gate_proj", change_norm(weight=None), READERS),
    "gain of another norm": (
        "llama",
        "model.layers.3.mlp.up_proj",
        change_norm(weight="model.layers.2.post_attention_layernorm.weight"),
        READERS,
    ),
    "offset 0 for 1": ("gemma2", "model.layers.3.self_attn.k_proj", change_norm(offset=0.0), READERS),
    "offset 1 for 0": ("llama", "model.layers.3.self_attn.k_proj", change_norm(offset=1.0), READERS),
    "centred dropped": ("gpt2", "transformer.h.0.attn.c_attn", change_norm(centred=False), READERS),
    "centred added": ("llama", "model.layers.1.self_attn.v_proj", change_norm(centred=True), READERS),
    "norm dropped": ("llama", "model.layers.1.self_attn.v_proj", lambda m: replace(m, reads=None), READERS),
    "writer missed": ("llama", "model.layers.3.mlp.down_proj", lambda m: None, WRITERS),
    "reader missed": ("llama", "model.layers.3.self_attn.k_proj", lambda m: None, READERS),
    "router missed": ("gpt_oss", "model.layers.1.mlp.router", lambda m: None, READERS),
    "bias missed": ("llama-bias", "model.layers.1.self_attn.o_proj", lambda m: replace(m, bias=None), WRITERS),
    "biases of experts missed": (
        "gpt_oss",
        "model.layers.1.mlp.experts",
        lambda m: replace(m, bias=None) if m.writes else m,
        WRITERS,
    ),
    "embedding missed": ("mistral", "model.embed_tokens", lambda m: None, WRITERS),
    "positions missed": ("gpt2", "transformer.wpe", lambda m: None, WRITERS),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_matrix_is_named(example: Callable[[str], Example], name: str) -> None:
    family, module, mutation, kind = MUTATIONS[name]
    found = example(family)
    wrong = [m for m in found.map.matrices if m.place.module == module]
    assert wrong
    kept = [mutation(m) if m in wrong else m for m in found.map.matrices]
    certificate = found.certificate(replace(found.map, matrices=tuple(m for m in kept if m is not None)))
    assert failing(certificate) == {(kind, wrong[0].layer, module)}
    assert certificate.tier is Tier.PARTIAL
    assert not certificate.proves(kind)
    assert certificate.proves(READERS if kind is WRITERS else WRITERS)
    (failure,) = certificate.failures
    assert failure.amount > 10 * (WRITTEN if kind is WRITERS else READ)
    assert module in failure.message
    assert f"{failure.amount:.2g}" in failure.message
    assert ("known there" in failure.message) == ("missed" in name and "bias" not in name)
    assert (
        certificate.reason_against(kind, None if wrong[0].layer is None else found.map.layers[wrong[0].layer])
        == failure.message
    )
    assert from_json(Certificate, json.loads(json.dumps(to_json(certificate)))) == certificate


def test_a_missed_stack_of_experts_is_named(example: Callable[[str], Example]) -> None:
    found = example("gpt_oss")
    for kind in EditKind:
        kept = [m for m in found.map.matrices if not (m.experts and m.layer == 1 and m.writes is (kind is WRITERS))]
        certificate = found.certificate(replace(found.map, matrices=tuple(kept)))
        assert failing(certificate) == {(kind, 1, "model.layers.1.mlp.experts")}


def test_a_missed_shared_expert_is_named(tmp_path: Path) -> None:
    found = Example(families.build("qwen2_moe", seed=2), tmp_path / "twin")
    assert found.certificate().tier is Tier.PROVEN
    missed = "model.layers.2.mlp.shared_expert.down_proj"
    kept = tuple(m for m in found.map.matrices if m.place.module != missed)
    assert len(kept) == len(found.map.matrices) - 1
    named = failing(found.certificate(replace(found.map, matrices=kept)))
    assert (WRITERS, 2, missed) in named
    assert {(kind, layer) for kind, layer, _ in named} == {(WRITERS, 2)}


def test_a_skipped_layer_is_named(example: Callable[[str], Example]) -> None:
    found = example("qwen3")
    kept = tuple(m for m in found.map.matrices if m.layer != 2)
    certificate = found.certificate(replace(found.map, matrices=kept))
    modules = {m.place.module for m in found.map.matrices if m.layer == 2}
    assert failing(certificate) == {(kind, 2, m) for kind, m in kinds(found.map) if m in modules}


def kinds(model_map: ModelMap) -> set[tuple[EditKind, str]]:
    return {(WRITERS if m.writes else READERS, m.place.module) for m in model_map.matrices}


def test_an_edit_of_the_wrong_sign_fails_everywhere(example: Callable[[str], Example]) -> None:
    def backwards(
        checkpoint: Checkpoint, model_map: ModelMap, directions: Tensor, kind: EditKind, folder: Path
    ) -> None:
        full_edit(checkpoint, model_map, directions, kind, folder, strength=-1.0)

    found = example("llama")
    certificate = found.certificate(edit=backwards)
    edited = {(kind, module) for kind, module in kinds(found.map)}
    assert {(kind, module) for kind, _, module in failing(certificate)} == edited
    assert certificate.tier is Tier.REFUSED


@pytest.mark.parametrize(("role", "kind"), [(Role.O, WRITERS), (Role.GATE, READERS)])
def test_swapped_names_are_noticed(example: Callable[[str], Example], role: Role, kind: EditKind) -> None:
    found = example("llama")
    first, second = (m for m in found.map.matrices if m.role is role and m.layer in (0, 1))
    swap = {first: replace(first, tensor=second.tensor), second: replace(second, tensor=first.tensor)}
    certificate = found.certificate(replace(found.map, matrices=tuple(swap.get(m, m) for m in found.map.matrices)))
    assert failing(certificate) == {(kind, m.layer, m.place.module) for m in (first, second)}


def test_an_expert_that_no_token_reaches_is_not_proven(tmp_path: Path) -> None:
    model = tiny.build("gpt_oss")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.router.bias")[3] = -1e4
    certificate = Example(model, tmp_path).certificate()
    stacks = {WRITERS: "model.layers.2.mlp.experts.down_proj", READERS: "model.layers.2.mlp.experts.gate_up_proj"}
    assert failing(certificate) == {(kind, 2, tensor) for kind, tensor in stacks.items()}
    assert all("expert 3 of" in failure.message for failure in certificate.failures)


def test_what_is_not_proven_is_not_edited(example: Callable[[str], Example]) -> None:
    found = example("llama")
    settings = EditSettings(targets=("writers",), skip_begin_layers=0, skip_end_layers=0)

    def lacking(role: Role) -> Certificate:
        kept = tuple(m for m in found.map.matrices if (m.role, m.layer) != (role, 1))
        return found.certificate(replace(found.map, matrices=kept))

    def examined(role: Role) -> Examined:
        own = replace(found.map, alike=tuple((path,) for path in found.map.layers))  # it is its own twin
        return Examined(with_proofs(own, lacking(role)), lacking(role))

    without_o = examined(Role.O)
    with pytest.raises(ForgeError, match=r"layer 1: model\.layers\.1\.self_attn\.o_proj") as refused:
        without_o.require_proven("it", settings, allow_partial=False)
    assert "--allow-partial edits that part" in str(refused.value.hint)
    chosen, skipped = select_matrices(without_o.require_proven("it", settings, allow_partial=True), settings)
    assert [(m.layer, m.role) for m in chosen] == [(layer, r) for layer in (0, 2, 3) for r in (Role.O, Role.DOWN)]
    assert "model.layers.1.self_attn.o_proj" in skipped["model.layers.1.mlp.down_proj.weight"]
    chosen, _ = select_matrices(examined(Role.Q).require_proven("it", settings, allow_partial=False), settings)
    assert len(chosen) == 8  # an edit of writers needs no proof of the readers
    with pytest.raises(ForgeError, match="leave none of the model's 4 layers"):
        examined(Role.Q).require_proven("it", replace(settings, skip_end_layers=9), allow_partial=True)


class _Sinusoids(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[-1])[:, None] / 10 ** (torch.arange(self.embedding_dim) / 8)
        return super().forward(ids) + angles.sin()


class _LlamaWithSinusoids(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens = _Sinusoids(config.vocab_size, config.hidden_size)


class _ScaledLayer(LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)
        return out * torch.linspace(0.5, 1.5, out.shape[-1])


class _LlamaWithScaledStream(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[2] = _ScaledLayer(config, 2)


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (_LlamaWithSinusoids, "something that is not a weight is added to the stream before the first layer"),
        (_LlamaWithScaledStream, "layer 2: the stream itself passes a norm, or a gain of each channel"),
    ],
)
def test_streams_that_no_edit_can_free_are_refused(
    tmp_path: Path, model_class: type[LlamaForCausalLM], reason: str
) -> None:
    torch.manual_seed(0)
    certificate = Example(model_class(tiny.FAMILIES["llama-bias"]()).eval(), tmp_path).certificate()
    assert certificate.tier is Tier.REFUSED
    assert not certificate.proves(WRITERS)
    assert certificate.reasons[0].startswith(reason)

"""Which prompts reach which matrices, and what proves matrices without a gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ollama_forge.architectures.certificate.certificate import EditKind, Tier
from ollama_forge.architectures.certificate.certify import certify
from ollama_forge.architectures.certificate.reach import _other_tokens, felt, prompts_for, prompts_reaching, reached
from ollama_forge.architectures.certificate.stream import held, watched
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Place, Role
from ollama_forge.architectures.twin import build as twins
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.architectures.twin.shrink import expert_count, free_sizes
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.certify import full_edit, loader
from tests import tiny

D = 8


class _Picky(nn.Module):
    """Token 5 alone reaches ``rare``; no gradient reaches ``stopped``; nothing reaches ``idle``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, D)
        self.rare, self.stopped, self.idle = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.words(input_ids)
        chosen = self.rare(x[input_ids == 5])
        x = x + self.stopped(x).detach()
        x[input_ids == 5] = x[input_ids == 5] + chosen
        return SimpleNamespace(logits=x, values=lambda: [x])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super().__call__(*args, **kwargs).logits
        return logits


def matrix(name: str) -> Matrix:
    return Matrix(name, Role.DOWN, 0, (D, D), (Place(name),), writes=True)


def test_prompts_are_found_for_what_few_tokens_reach() -> None:
    ids = torch.tensor([[3, 4, 6, 9], [9, 8, 6, 3]])
    twin = Twin(_Picky(), {"eos_token_id": 7}, {"input_ids": ids})
    matrices = [matrix(name) for name in ("rare", "stopped", "idle")]
    assert [prompt["input_ids"].shape[1] for prompt in prompts_for(twin)] == [4, 2, 1]
    assert reached(twin.model, prompts_for(twin), matrices) == set()
    missing = {(one.tensor, None) for one in matrices}
    (more,) = prompts_reaching(twin, twin.model, matrices, missing)
    assert 5 in more["input_ids"]
    assert 7 not in torch.cat([_other_tokens(twin, seed) for seed in range(20)])  # it is special
    assert reached(twin.model, [more], matrices) == {("rare", None)}
    assert felt(twin.model, more, matrices, missing - {("rare", None)}) == {("stopped", None)}


def test_what_gets_other_tokens_is_not_held() -> None:
    layer = nn.Linear(D, D)
    with watched([layer]) as seen:
        layer(torch.ones(4, D))
    with held(seen):
        assert torch.equal(layer(torch.zeros(4, D)), seen[layer][0].output)
        assert torch.equal(layer(torch.zeros(3, D)), layer.bias.expand(3, D))
    with held(seen, silent=[layer]):
        assert not layer(torch.ones(3, D)).any()


class _ChoosingLayer(LlamaDecoderLayer):
    """Its chooser ranks the tokens to attend to, and all of them are kept."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.chooser = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ranks = self.chooser(self.input_layernorm(hidden_states)).topk(hidden_states.shape[1], dim=1).indices
        kept = ranks.sort(dim=1).values.expand_as(hidden_states)
        out: Tensor = super().forward(hidden_states.gather(1, kept), *args, **kwargs)
        return out


class _LlamaThatChooses(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1] = _ChoosingLayer(config, 1)


def test_readers_that_only_choose_are_proven_by_what_they_give(tmp_path: Path) -> None:
    plain, name = tiny.build("llama"), "model.layers.1.chooser"
    model = _LlamaThatChooses(plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    known = map_checkpoint(tiny.save(plain, tmp_path / "plain"))
    norm = next(m.reads for m in known.matrices if m.layer == 1 and m.role is Role.Q)
    shape = tuple(model.get_submodule(name).weight.shape)
    chooser = Matrix(f"{name}.weight", Role.MIXER, 1, shape, (Place(name),), writes=False, reads=norm)
    model_map = replace(known, matrices=(*known.matrices, chooser))
    checkpoint = tiny.save(model.eval(), tmp_path / "chooses")
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    twin = Twin(model, checkpoint.config, {"input_ids": ids, "use_cache": False})

    def without_chooser(checkpoint: Checkpoint, found: ModelMap, *rest: Any) -> None:
        full_edit(checkpoint, replace(found, matrices=known.matrices), *rest)

    assert certify(twin, checkpoint, model_map, full_edit, loader(twin)).tier is Tier.PROVEN
    certificate = certify(twin, checkpoint, model_map, without_chooser, loader(twin))
    assert {(f.kind, f.layer, f.module) for f in certificate.failures} == {(EditKind.READERS, 1, chooser.tensor)}


def test_tables_of_choices_name_every_expert() -> None:
    model = nn.Module()
    model.table = nn.Buffer(torch.zeros(40, 2, dtype=torch.long))
    model.order = nn.Buffer(torch.arange(8).view(4, 2))
    twins._fill_choices(model, expert_count({"vocab_size": 40, "moe": {"num_experts": 6}, "n_shared_experts": 1}), 0)
    assert model.table.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert bool((model.table[:, 0] != model.table[:, 1]).all())
    assert torch.equal(model.order, torch.arange(8).view(4, 2))


def test_vocabularies_stay_as_they_are() -> None:
    config = {"hidden_size": 96, "vocab_size": 264, "unpadded_vocab_size": 264, "intermediate_size": 264}
    assert free_sizes(config) == [(("intermediate_size",), 264)]


class _Even(nn.Module):
    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=input_ids.float().view(-1, 2, 4))


def test_a_twin_runs_on_texts_of_any_length() -> None:
    twin = Twin(_Even(), {}, {"input_ids": torch.ones(2, 32, dtype=torch.long)})
    assert twin.run().shape == (8, 2, 4)
    with pytest.raises(RuntimeError, match="invalid for input of size 13"):
        twins._check_runs(twin)


def test_a_causal_lm_that_is_loaded_from_its_wrappers_config(tmp_path: Path) -> None:
    twin = twins.build_twin({"model_type": "mllama", "architectures": ["MllamaForCausalLM"]})
    twins.save_twin(twin, tmp_path)
    checkpoint = Checkpoint(tmp_path, "it", "folder")
    assert checkpoint.config["model_type"] == "mllama"
    assert map_checkpoint(checkpoint).matrices

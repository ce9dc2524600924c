"""A made-up architecture with an odd name for everything is learned and certified, unless it hides a writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ollama_forge.architectures.certificate.certificate import Certificate, EditKind, Tier
from ollama_forge.architectures.learn import learn_from
from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.architectures.names.bind import bind_checkpoint
from ollama_forge.architectures.twin.build import build_twin, save_twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.certify import certify_twin
from ollama_forge.edits.proven import Examined, with_proofs
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError


class OrchardConfig(PretrainedConfig):
    model_type = "orchard"

    def __init__(self, **options: Any) -> None:
        sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 384}
        for name, value in {**sizes, "vocab_size": 300, "max_position_embeddings": 512, "hollow": False}.items():
            setattr(self, name, options.pop(name, value))
        super().__init__(**{"tie_word_embeddings": False, **options})


class Pebble(nn.Module):
    """A norm whose gain is stored less 1, and which subtracts no mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.moss = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.moss)


class Beehive(nn.Module):
    """Causal attention with one matrix ``[in, out]`` for q, k and v, and a bias where it writes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.nectar = nn.Parameter(torch.zeros(width, 3 * width))
        self.honey = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.nectar).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.honey(mixed.transpose(1, 2).flatten(2))


class Cellar(nn.Module):
    """An MLP that multiplies two of its products."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.barrel, self.cork = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.bottle = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottle(nn.functional.silu(self.barrel(x)) * self.cork(x))


class Tree(nn.Module):
    def __init__(self, config: OrchardConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.bark, self.leaf, self.rind = Pebble(width), nn.LayerNorm(width), Pebble(width)
        self.swarm = Beehive(width, config.num_attention_heads)
        self.vault = Cellar(width, config.intermediate_size)

    def forward(self, sap: Tensor) -> Tensor:
        sap = sap + self.swarm(self.bark(sap))
        return sap + self.rind(self.vault(self.leaf(sap)))


class Orchard(PreTrainedModel):
    config_class = OrchardConfig

    def __init__(self, config: OrchardConfig) -> None:
        super().__init__(config)
        self.seeds = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rows = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.grove = nn.ModuleList(
            (HollowTree if config.hollow else Tree)(config) for _ in range(config.num_hidden_layers)
        )
        self.sieve = Pebble(config.hidden_size)
        self.market = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.seeds

    def get_output_embeddings(self) -> nn.Module:
        return self.market

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        sap = self.seeds(input_ids) + self.rows(torch.arange(input_ids.shape[1]))
        for tree in self.grove:
            sap = tree(sap)
        return CausalLMOutput(logits=self.market(self.sieve(sap)))


class Worm(nn.Module):
    """A second path into the stream, which no edit of its matrix can keep free of a direction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tunnel = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.tunnel)


class HollowTree(Tree):
    def __init__(self, config: OrchardConfig) -> None:
        super().__init__(config)
        self.worm = Worm(config.hidden_size)

    def forward(self, sap: Tensor) -> Tensor:
        return super().forward(sap) + self.worm(self.bark(sap))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    AutoConfig.register("orchard", OrchardConfig)
    AutoModelForCausalLM.register(OrchardConfig, Orchard)
    yield
    CONFIG_MAPPING._extra_content.pop("orchard")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OrchardConfig)


def examine(config: OrchardConfig, folder: Path) -> tuple[ModelMap, Certificate]:
    twin = build_twin(config.to_dict())
    save_twin(twin, folder)
    checkpoint = Checkpoint(folder, "twin", "folder")
    model_map = bind_checkpoint(learn_from(twin), checkpoint)
    return model_map, certify_twin(twin, checkpoint, model_map)


def test_it_is_learned_and_certified(tmp_path: Path) -> None:
    model_map, certificate = examine(OrchardConfig(), tmp_path)
    assert certificate.tier is Tier.PROVEN, certificate.reasons
    by_tensor = {m.tensor: m for m in model_map.matrices}
    roles = {"swarm.nectar": Role.QKV, "swarm.honey.weight": Role.O, "vault.bottle.weight": Role.DOWN}
    assert {name: by_tensor[f"grove.1.{name}"].role for name in roles} == roles
    assert {by_tensor[f"grove.1.vault.{name}.weight"].role for name in ("barrel", "cork")} == {Role.GATE, Role.UP}
    assert (by_tensor["seeds.weight"].role, by_tensor["rows.weight"].role) == (Role.EMBEDDING, Role.POSITION)
    honey, nectar, cork, bottle = (
        by_tensor[f"grove.1.{name}"]
        for name in ("swarm.honey.weight", "swarm.nectar", "vault.cork.weight", "vault.bottle.weight")
    )
    assert honey.bias == "grove.1.swarm.honey.bias"
    assert nectar.transposed
    assert nectar.reads is not None
    assert cork.reads is not None
    assert (nectar.reads.weight, nectar.reads.offset, nectar.reads.centred) == ("grove.1.bark.moss", 1.0, False)
    assert (cork.reads.weight, cork.reads.offset, cork.reads.centred) == ("grove.1.leaf.weight", 0.0, True)
    assert [norm.weight for norm in bottle.post_norms] == ["grove.1.rind.moss"]


def test_one_that_hides_a_writer_is_refused_by_name(tmp_path: Path) -> None:
    model_map, certificate = examine(OrchardConfig(hollow=True), tmp_path)
    assert certificate.tier is Tier.REFUSED
    writing = {f.module for f in certificate.failures if f.kind is EditKind.WRITERS}
    assert writing == {f"{block}.worm" for block in certificate.blocks}
    settings = EditSettings(targets=("writers",), skip_begin_layers=0, skip_end_layers=0)
    with pytest.raises(ForgeError, match=r"grove\.0\.worm"):
        Examined(with_proofs(model_map, certificate), certificate).require_proven("it", settings, allow_partial=True)

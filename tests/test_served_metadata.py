"""Facts about a checkpoint, as show and tags report them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.serving.metadata import ModelMetadata, human_count
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (134_515_008, "134.52M"),
        (630_167_424, "630.17M"),
        (8_030_261_248, "8.0B"),
        (7_000_000_000, "7B"),
        (22_700_000, "22.70M"),
        (33_000, "33K"),
        (999, "999"),
    ],
)
def test_counts_as_ollama_prints_them(count: int, text: str) -> None:
    assert human_count(count) == text


def test_the_demo_models_facts() -> None:
    facts = ModelMetadata.of(resolve("demo-base"), "Be brief.")
    assert (facts.family, facts.families, facts.format) == ("llama", ("llama",), "safetensors")
    assert (facts.parameter_size, facts.parameter_count, facts.quantization_level) == ("134.52M", 134_515_008, "BF16")
    assert (facts.context_length, facts.embedding_length, facts.system) == (8192, 576, "Be brief.")
    assert len(facts.digest) == 64
    assert facts.size > 2 * facts.parameter_count
    expected = {
        "general.architecture": "llama",
        "general.parameter_count": 134_515_008,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.block_count": 30,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.rope.freq_base": 100000,
        "llama.vocab_size": 49152,
    }
    assert {key: facts.model_info[key] for key in expected} == expected
    json.dumps(dict(facts.model_info))


def test_facts_are_the_same_again_and_other_weights_have_another_digest(tmp_path: Path) -> None:
    first = tiny.save(tiny.build("qwen3"), tmp_path / "a")
    facts = ModelMetadata.of(first)
    again = ModelMetadata.of(Checkpoint(first.folder, "other label", "folder"))
    assert facts == again
    assert ModelMetadata.of(tiny.save(tiny.build("qwen3", seed=1), tmp_path / "b")).digest != facts.digest
    assert (facts.family, facts.quantization_level) == ("qwen3", "F32")


def test_a_multimodal_checkpoint_and_a_mixture_of_experts_have_their_own_numbers(tmp_path: Path) -> None:
    facts = ModelMetadata.of(tiny.save(tiny.build("gemma3"), tmp_path / "a"))
    assert (facts.family, facts.embedding_length) == ("gemma3", 32)
    facts = ModelMetadata.of(tiny.save(tiny.build("gpt_oss"), tmp_path / "b"))
    assert (facts.family, facts.model_info["gptoss.expert_count"]) == ("gptoss", 4)
    facts = ModelMetadata.of(tiny.save(tiny.build("gpt2"), tmp_path / "c"))
    assert facts.model_info["gpt2.context_length"] == 512


def test_provenance_names_the_source_without_its_path(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "a")
    assert ModelMetadata.of(checkpoint).provenance == ()
    record = {
        "version": "1.0",
        "source": {"model": "/secret/place/x.gguf", "kind": "gguf"},
        "factors": "orthogonal",
        "direction": {"method": "difference-of-means", "layer": 3},
    }
    (checkpoint.folder / "abliteration.json").write_text(json.dumps(record))
    assert ModelMetadata.of(checkpoint).provenance == (
        "edited with ollama-forge: 1.0",
        "source: x.gguf",
        "factors: orthogonal",
        "direction: difference-of-means",
        "layer: 3",
    )
    record["source"] = {"model": "org/model", "kind": "hub"}
    (checkpoint.folder / "abliteration.json").write_text(json.dumps(record))
    assert "source: org/model" in ModelMetadata.of(checkpoint).provenance


def test_ends_are_those_of_all_configs(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "a")
    path = checkpoint.folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [3, 4]}))
    assert set(Tokenizer.load(checkpoint.folder).end_ids) == {1, 3, 4}

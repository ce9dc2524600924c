"""Adapters made of edits: the base model with the adapter computes what the edited model does, or the export refuses."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ollama_forge.api import export_adapter
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.adapters.peft import write_peft_adapter
from ollama_forge.export.convert import convert
from ollama_forge.files import read_json, write_json
from tests import families, llamacpp_adapter, tiny
from tests.test_export_convert import byte_pairs

PROMPTS = [[5, 40, 77, 130], [9, 200, 31, 31, 8, 61, 100]]
LETTER = 2 + ord("a")
ALL_TOKENS = 1 << 20
TABLES = {Role.EMBEDDING, Role.UNEMBEDDING, Role.POSITION}


def edit_of(source: Checkpoint, model: ModelMap, chosen: Callable[[Matrix], bool], scale: float = 1.0) -> EditRecord:
    """An edit that changes all chosen matrices by random factors; the rank of readers is 2, that of writers is 1."""
    records = {}
    for number, matrix in enumerate(model.matrices):
        if not chosen(matrix):
            continue
        generator = torch.Generator().manual_seed(number)
        stack = (matrix.shape[0],) if matrix.experts else ()
        rank = 1 if matrix.writes else 2
        left, right = (
            torch.randn(*stack, size, rank, generator=generator) / size**0.5
            for size in (matrix.out_features, matrix.in_features)
        )
        records[matrix.tensor] = MatrixRecord(left, 2 * right, 1.5 * scale, Rescale.NONE)
    return EditRecord("least-squares", source.fingerprint, records)


def edited_model(source: Checkpoint, model: ModelMap, edit: EditRecord, folder: Path) -> Any:
    write_checkpoint(source, model, edit.plan(model, source.fingerprint), folder, settings=None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def log_probs(model: Any) -> Tensor:
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS])


# -- PEFT --------------------------------------------------------------------------------------------------------


def not_tables(matrix: Matrix) -> bool:
    return matrix.role not in TABLES


PEFT_CASES: dict[str, Callable[[Matrix], bool]] = {
    "mistral": lambda matrix: True,  # its tables are not tied
    "gpt2": not_tables,  # Conv1D, with q, k and v in one matrix
    "phi3": not_tables,
}


@pytest.mark.parametrize("family", PEFT_CASES)
def test_peft_adapter_is_the_edit(tmp_path: Path, family: str) -> None:
    source = tiny.save(tiny.build(family), tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, PEFT_CASES[family])
    edit.save(tmp_path / "edit.safetensors")
    edited = log_probs(edited_model(source, model, edit, tmp_path / "edited"))
    export_adapter(tmp_path / "edit.safetensors", str(source.folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    before = log_probs(base)
    adapted = log_probs(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (before - edited).abs().max() > 0.5
    torch.testing.assert_close(adapted, edited, rtol=0, atol=2e-4)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert len(config["target_modules"]) == len(edit.matrices)
    assert str(tmp_path).encode() not in (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_peft_refuses_stacked_experts(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("gpt_oss"), tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, lambda matrix: matrix.is_expert)
    with pytest.raises(ForgeError, match="not the weight of a linear layer"):
        write_peft_adapter(edit, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- GGUF --------------------------------------------------------------------------------------------------------


@contextmanager
def llama_cpp(file: Path, adapter: Path) -> Iterator[Callable[[float], Tensor]]:
    """A function that computes log-probabilities with the adapter at a scale."""
    command = [sys.executable, "-P", llamacpp_adapter.__file__, str(file), str(adapter)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        try:
            with httpx.Client(base_url=address, timeout=None, trust_env=False) as client:
                yield lambda scale: torch.stack([_next(client, prompt, scale) for prompt in PROMPTS])
        finally:
            process.kill()


def _next(client: httpx.Client, prompt: list[int], scale: float) -> Tensor:
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": ALL_TOKENS, "cache_prompt": False}
    body |= {"logit_bias": [[LETTER, 1e6]], "lora": [{"id": 0, "scale": scale}]}
    found = client.post("/completion", json=body).json()["completion_probabilities"][0]["top_logprobs"]
    row = torch.empty(len(found))
    row[[entry["id"] for entry in found]] = torch.tensor([entry["logprob"] for entry in found])
    return row.log_softmax(-1)


GGUF_CASES: dict[str, Callable[[Matrix], bool]] = {
    "mistral": lambda matrix: True,  # rows of q and k are permuted
    "gpt2": not_tables,  # transposed
    "falcon": not_tables,  # q, k and v are regrouped
    "qwen3_moe": not_tables,  # experts are stacked
}


def convertible(family: str, folder: Path) -> Checkpoint:
    """A model that llama.cpp's converter takes: with a merge in its tokenizer, and keys of older configs."""
    model: Any = tiny.build(family) if family in tiny.FAMILIES else families.build(family)
    model.resize_token_embeddings(tiny.VOCABULARY + 1)
    source = tiny.save(model.half().float(), folder)
    byte_pairs((("t", "h"),)).save_pretrained(folder)
    older = {"gpt2": {"n_ctx": 512}, "qwen3_moe": {"norm_topk_prob": True}}.get(family, {})
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **older})
    return source


@pytest.mark.parametrize("family", GGUF_CASES)
def test_gguf_adapter_is_the_edit(tmp_path: Path, family: str) -> None:
    source = convertible(family, tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, GGUF_CASES[family])
    edit.save(tmp_path / "edit.safetensors")
    export_adapter(tmp_path / "edit.safetensors", str(source.folder), tmp_path / "adapter.gguf", form="gguf")
    convert(find_converter(None), source, tmp_path / "base.gguf", outtype="f16", name="Base")
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as adapted:
        for scale in (0.0, 1.0, -0.5):
            scaled = edit_of(source, model, GGUF_CASES[family], scale)
            edited = log_probs(edited_model(source, model, scaled, tmp_path / f"edited {scale}"))
            print(family, scale, (adapted(scale) - edited).abs().max(), (adapted(0.0) - edited).abs().max())
            torch.testing.assert_close(adapted(scale), edited, rtol=0, atol=0.05)
            assert scale == 0 or (adapted(0.0) - edited).abs().max() > 0.5

"""Which engine is taken: for a GGUF file, for a run that made one, and how llama.cpp is compared with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import UsageError
from ollama_forge.models import gguf_model
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving.engine import choice
from ollama_forge.serving.engine.base import EngineSettings
from ollama_forge.serving.engine.choice import Comparison, LoadedEngine, compare, gguf_of, load_engine
from tests.engines import greedy, prompt, together
from tests.gguf_models import Model

CPU = LoadSettings(dtype="float32", device="cpu")
needs_llamacpp = pytest.mark.skipif(
    not gguf_model.llamacpp_is_installed(), reason="the extra llamacpp is not installed"
)


@pytest.mark.parametrize(
    ("found", "taken", "says"),
    [
        (Comparison(200, 3), False, "splits 3 of 200 texts into other tokens"),
        (Comparison(200, 0), True, "would not fit the memory"),
        (Comparison(200, 0, 0, 0, 50, 20), False, "ends every answer at once"),
        (Comparison(200, 0, 100, 94, 50, 20), False, "agrees on 94% of 100 tokens only"),
        (Comparison(200, 0, 100, 95, 50, 20), True, "50 tokens/s for one answer, transformers 20; they agree on 95%"),
        (Comparison(200, 0, 100, 99, 20, 50), False, "50 tokens/s for one answer, llama.cpp 20; they agree on 99%"),
    ],
)
def test_verdicts(found: Comparison, taken: bool, says: str) -> None:
    assert found.verdict[0] is taken
    assert says in found.verdict[1]


def run_of(model: Model, folder: Path) -> Checkpoint:
    """A folder as a run leaves it."""
    run = folder / "abliterate-mine"
    shutil.copytree(model.checkpoint.folder, run / "checkpoint")
    shutil.copy(model.path, run / "mine.gguf")
    (run / "mine-adapter.gguf").write_bytes(b"")
    return Checkpoint(run / "checkpoint", str(run / "checkpoint"), "folder")


def test_files_of_runs(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    model = gguf_models["gemma2"]
    made = run_of(model, tmp_path)
    assert gguf_of(made) == tmp_path.resolve() / "abliterate-mine/mine.gguf"
    assert gguf_of(model.checkpoint) is None
    assert gguf_of(model.opened(model.path)) == model.path
    (tmp_path / "abliterate-mine/mine.gguf").rename(tmp_path / "abliterate-mine/mine-Q4_K_M.gguf")
    assert gguf_of(made) == tmp_path.resolve() / "abliterate-mine/mine-Q4_K_M.gguf"


def test_without_a_file_there_is_one_engine(gguf_models: Mapping[str, Model]) -> None:
    checkpoint = gguf_models["gemma2"].checkpoint
    with pytest.raises(UsageError, match="has no GGUF file"):
        load_engine(checkpoint, CPU, EngineSettings("llamacpp", slots=2))
    loaded = load_engine(checkpoint, CPU, EngineSettings(slots=2))
    loaded.engine.close()
    assert loaded.reason == "engine: transformers (there is no GGUF file)"


@needs_llamacpp
def test_the_comparison_of_a_run_is_kept(
    gguf_models: Mapping[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "usable_threads", lambda: 1)
    made = run_of(gguf_models["gemma2"], tmp_path)
    first = load_engine(made, CPU, EngineSettings(slots=2))
    kept = json.loads((tmp_path / "abliterate-mine/engine.json").read_text())
    assert kept["differing"] == 0
    assert kept["agreeing"] >= 0.95 * kept["tokens"] > 0
    for faster in (True, False):  # as if it had been measured so
        changed = {**kept, "llamacpp_rate": 9.0, "transformers_rate": 5.0 if faster else 20.0}
        (tmp_path / "abliterate-mine/engine.json").write_text(json.dumps(changed))
        monkeypatch.setattr(choice, "compare", None)
        again = load_engine(made, CPU, EngineSettings(slots=2))
        assert again.reason.startswith("engine: llama.cpp on mine.gguf" if faster else "engine: transformers (20 tok")
        assert again.checkpoint.kind == ("gguf" if faster else "folder")
        assert answered(again) == answered(first)
        again.engine.close()
    first.engine.close()


def answered(loaded: LoadedEngine) -> list[list[int]]:
    return together(loaded.engine, [greedy(prompt(20), 12)])  # type: ignore[arg-type]


@needs_llamacpp
def test_other_weights_do_not_agree(
    gguf_models: Mapping[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "usable_threads", lambda: 1)
    model = gguf_models["gemma2"]
    folder = tmp_path / "other"
    shutil.copytree(model.checkpoint.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn_like(tensors["model.norm.weight"]) * 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found, _ = compare(Checkpoint(folder, "other", "folder"), model.path, CPU)
    assert found.differing == 0
    assert found.agreeing < 0.5 * found.tokens
    assert found.verdict[0] is False

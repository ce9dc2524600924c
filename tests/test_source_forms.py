"""Forms of model sources: quantised, pickled, of unknown types, adapters; and the message for each."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints import pickled
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.resolve import resolve
from tests import tiny

SETTINGS = LoadSettings(device="cpu", dtype="float32")
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(folder: Path, **config: Any) -> Path:
    tiny.save(tiny.build("llama"), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def pack(folder: Path, name: str = "model.layers.0.self_attn.q_proj.weight") -> None:
    """Store one matrix as bytes, as quantised checkpoints do."""
    weights = load_file(folder / SINGLE_NAME)
    weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(weights, folder / SINGLE_NAME)


# Quantised


@pytest.mark.parametrize(
    ("entry", "described"),
    [
        ({"quantization_config": BITSANDBYTES}, "bitsandbytes in 4 bits, library bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes in 8 bits, library bitsandbytes"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ, library autoawq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, library gptqmodel"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "library compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "library compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8 in blocks"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ, library hqq"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao, library torchao"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, library mlx-lm"),
        ({"text_config": {"quantization_config": {"quant_method": "NEW"}}}, "quant_method 'new'"),
    ],
)
def test_a_quantised_model_is_refused_by_its_config(tmp_path: Path, entry: dict[str, Any], described: str) -> None:
    folder = saved(tmp_path / "model", **entry)
    pack(folder)
    with pytest.raises(ForgeError) as caught:
        resolve(str(folder))
    assert "is quantised (" in caught.value.message
    assert described in caught.value.message
    assert caught.value.hint == "use the unquantised model"
    (folder / "README.md").write_text("---\nbase_model: owner/original\n---\n# quantised\n")
    with pytest.raises(ForgeError) as caught:
        resolve(str(folder))
    assert caught.value.hint == "use the unquantised model, owner/original according to the model card"


def test_a_mark_over_plain_weights_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", quantization_config=BITSANDBYTES)
    source = resolve(str(folder))
    assert "names a quantisation (bitsandbytes), but all weights are floats" in capsys.readouterr().err
    assert "quantization_config" not in source.config
    ChatModel.load(source, SETTINGS)
    RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    written, _ = apply(str(folder), tmp_path / "edited", refusal_pt=tmp_path / "refusal.pt")
    assert "quantization_config" not in json.loads((written.folder / "config.json").read_text())
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


# Pickled


def bin_weights(folder: Path, files: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    """Turn a folder's weights into .bin files, the tied head sharing the embedding's memory, as torch saved models."""
    weights = load_file(folder / SINGLE_NAME)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (folder / SINGLE_NAME).unlink()
    names = sorted(weights)
    if files == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return weights
    weight_map = {}
    for number in range(files):
        file, part = f"pytorch_model-{number + 1:05}-of-{files:05}.bin", names[number::files]
        torch.save({name: weights[name] for name in part}, folder / file, **options)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


@pytest.mark.parametrize(("files", "zipped"), [(1, True), (3, True), (1, False)])
def test_bin_files_become_safetensors_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, files: int, zipped: bool
) -> None:
    folder = saved(tmp_path / "model")
    weights = bin_weights(folder, files, _use_new_zipfile_serialization=zipped)
    (folder / "training_args.bin").write_bytes(b"not read")
    checkpoint = resolve(str(folder))
    assert checkpoint.kind == "pickled"
    assert checkpoint.folder.is_relative_to(cache)
    assert checkpoint.tensors.keys() == weights.keys()
    assert len(checkpoint.tensors.shards) == files
    for name, tensor in weights.items():
        assert bytes(checkpoint.tensors.read_bytes(name)) == tensor.numpy().tobytes(), name
    module = ChatModel.load(checkpoint, SETTINGS).module
    assert torch.equal(module.get_parameter("model.embed_tokens.weight"), weights["lm_head.weight"])
    kept = {path.name for path in checkpoint.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < kept
    assert not any(name.endswith(".bin") or "pytorch_model" in name for name in kept)

    def fail(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(pickled, "_convert", fail)
    assert resolve(str(folder)).folder == checkpoint.folder
    (folder / "chat_template.jinja").write_text("another")
    with pytest.raises(AssertionError, match="converted again"):
        resolve(str(folder))


def test_an_edit_of_bin_files_is_an_edited_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    weights = bin_weights(folder, 2)
    RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    written, applied = apply(str(folder), tmp_path / "edited", refusal_pt=tmp_path / "refusal.pt", out_dtype="keep")
    assert set(json.loads((written.folder / INDEX_NAME).read_text())["weight_map"]) == set(weights)
    assert applied.changed
    assert str(tmp_path) not in (written.folder / "abliteration.json").read_text()
    ChatModel.load(written, SETTINGS)


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hostile", "holds objects other than tensors, and reading those could execute code"),
        ("hostile pickle", "holds objects other than tensors, and reading those could execute code|cannot be read"),
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, "'state_dict' is a dict, perhaps the state_dict"),
        ({"a": torch.ones(2), "step": 3}, "'step' is a int"),
        ([torch.ones(2)], "holds a list, not a state_dict"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a is stored as complex64"),
        ({"a": torch.eye(2).to_sparse()}, "cannot be converted"),
        (b"", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "holds objects other than tensors|cannot be read"),
    ],
)
def test_a_bin_file_that_holds_more_than_tensors_is_refused(
    tmp_path: Path, cache: Path, content: Any, message: str
) -> None:
    folder, mark = saved(tmp_path / "model"), tmp_path / "code has run"
    (folder / SINGLE_NAME).unlink()
    path = folder / "pytorch_model.bin"
    if content == "hostile":
        torch.save({"a": torch.ones(2), "b": Hostile(mark)}, path)
    elif content == "hostile pickle":
        path.write_bytes(pickle.dumps({"a": Hostile(mark)}, protocol=2))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ForgeError, match=message) as caught:
        resolve(str(folder))
    assert "\n" not in caught.value.message
    assert not mark.exists()
    assert not [found for found in cache.rglob("*") if found.name != "pickled"]


def test_a_bin_file_that_is_cut_short_or_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    bin_weights(folder, 2)
    path = folder / "pytorch_model-00002-of-00002.bin"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ForgeError, match=r"00002-of-00002\.bin cannot be read"):
        resolve(str(folder))
    path.unlink()
    with pytest.raises(ForgeError, match=r"lacks 1 of its \.bin files, such as .*00002-of-00002\.bin"):
        resolve(str(folder))
    path.write_bytes(data)
    monkeypatch.setattr(pickled, "free_space", lambda _: 1000)
    with pytest.raises(ForgeError, match=r"needs .* KB in .*, but 1\.0 KB are free") as caught:
        resolve(str(folder))
    assert "OLLAMA_FORGE_CACHE" in caught.value.hint


# Types of models that are not known


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"transformers_version": "99.1.0.dev0"}, "does not support the model_type 'llama99'", "transformers>=99.1.0"),
        (
            {"transformers_version": "4.1"},
            f"transformers {transformers.__version__} does not support",
            "may support it",
        ),
        ({"transformers_version": None}, "does not support the model_type", "pip install -U transformers"),
        (
            {"auto_map": {"AutoModel": "x.Y"}},
            r"own model code \(auto_map in config\.json\), which is not executed",
            "",
        ),
    ],
)
def test_a_model_type_that_transformers_lacks(tmp_path: Path, config: dict[str, Any], message: str, hint: str) -> None:
    checkpoint = resolve(str(saved(tmp_path / "model", model_type="llama99", **config)))
    for use in (map_checkpoint, lambda source: ChatModel.load(source, SETTINGS)):
        with pytest.raises(ForgeError, match=message) as caught:
            use(checkpoint)
        assert hint in caught.value.hint


def test_remote_code_beside_a_known_type_is_passed_over(tmp_path: Path) -> None:
    ChatModel.load(resolve(str(saved(tmp_path / "model", auto_map={"AutoModel": "x.Y"}))), SETTINGS)


# Folders without weights that can be read


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["b.gguf", "a.gguf"], "holds only GGUF files: a.gguf, b.gguf", "give one of these files"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter", "--adapter"),
        (["diffusion_pytorch_model.safetensors"], "weights of a diffusion model: diffusion_pytorch", "release"),
        (["consolidated.safetensors"], "in Mistral's format: consolidated.safetensors", "release"),
        (["consolidated.00.pth", "consolidated.01.pth"], "in Meta's format", "release"),
        (["model.fp16.safetensors"], "under file names that transformers does not read: model.fp16", "release"),
        (["tf_model.h5"], "for TensorFlow: tf_model.h5", "release"),
        (["training_args.bin", "optimizer.pt"], "no other weights", "model folder"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_says_what_it_holds_instead_of_weights(
    tmp_path: Path, files: list[str], message: str, hint: str, config: bool
) -> None:
    for name in [*files, *(["config.json"] if config else [])]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ForgeError) as caught:
        resolve(str(tmp_path))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert ("no config.json" in caught.value.message) is not config

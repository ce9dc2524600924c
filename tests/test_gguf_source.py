"""A GGUF file as the source: its values under their Hugging Face names, its config, its tokenizer and its template."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf import file as gguf_file
from ollama_forge.checkpoints.gguf.file import Gguf, read_part, value_of
from ollama_forge.checkpoints.hub_gguf import GgufReference
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources import gguf as gguf_source
from ollama_forge.sources import resolve as resolving
from ollama_forge.sources.resolve import resolve, resolve_gguf
from tests import tiny

D, HEADS, KV, FF, LAYERS = 64, 4, 2, 96, 2
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SHAPES = {
    "attn_norm": (D,),
    "ffn_norm": (D,),
    "attn_q": (D, D),
    "attn_k": (D * KV // HEADS, D),
    "attn_v": (D * KV // HEADS, D),
    "attn_output": (D, D),
    "ffn_gate": (FF, D),
    "ffn_up": (FF, D),
    "ffn_down": (D, FF),
}


def vocabulary() -> list[str]:
    """The bytes of the tiny tokenizer and one merge of two of them."""
    numbered = tiny.tokenizer().get_vocab()
    return [*sorted(numbered, key=lambda token: numbered[token]), "th"]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each head, alternating."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path, half: bool = True, without: tuple[str, ...] = (), q8: bool = False, **split: int
) -> dict[str, torch.Tensor]:
    """A random llama; returns its values under their Hugging Face names, as the file holds them.

    Args:
        split: options of the writer that splits the file.
    """
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama", **split)  # type: ignore[arg-type]
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_key_length(D // HEADS)
    writer.add_value_length(D // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(tiny.SPECIAL) + [1] * (len(tokens) - len(tiny.SPECIAL)))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny.TEMPLATE)
    names = {"token_embd": ("model.embed_tokens", (len(tokens), D)), "output_norm": ("model.norm", (D,))}
    for layer in range(LAYERS):
        for name, theirs in LAYER_NAMES.items():
            names[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{theirs}", SHAPES[name])
    random, values = np.random.default_rng(0), {}
    for name, (theirs, shape) in names.items():
        values_drawn = random.standard_normal(shape).astype(np.float32)
        if name in without:
            continue
        held = values_drawn.astype(np.float16) if half and len(shape) == 2 else values_drawn
        order = HEADS if "attn_q" in name else KV if "attn_k" in name else 0
        in_file = interleaved(held, order) if order else held
        if q8 and name.endswith("ffn_down"):
            packed = gguf.quants.quantize(values_drawn, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            held = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", in_file)
        values[f"{theirs}.weight"] = torch.from_numpy(held.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: Path) -> Path:
    """A cache of its own, in which the config and the layout of the tiny model are learned already."""
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(learned, tmp_path / "cache" / "architectures")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is learned of the tiny model, once."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_FORGE_CACHE", str(folder))
        write(folder / "tiny.gguf")
        resolve(str(folder / "tiny.gguf"))
    return folder / "architectures"


def held(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name: decode_tensor(checkpoint.tensors.read_bytes(name), info.dtype, info.shape)
        for name, info in checkpoint.tensors.items()
    }


def assert_holds(checkpoint: Checkpoint, values: dict[str, torch.Tensor]) -> None:
    found = held(checkpoint)
    assert set(found) == set(values)
    for name, tensor in values.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["half", "full", "q8"])
def test_the_values_of_the_file_are_those_of_the_checkpoint(tmp_path: Path, cache: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    values = write(path, half=kind == "half", q8=kind == "q8")
    checkpoint = resolve(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (checkpoint.kind, checkpoint.label, checkpoint.revision) == ("gguf", str(path), digest)
    assert checkpoint.fingerprint == digest
    assert_holds(checkpoint, values)
    assert checkpoint.folder.is_relative_to(cache)
    assert {file.name for file in checkpoint.folder.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }


def test_the_config_is_that_of_a_plain_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, q8=True)
    checkpoint = resolve(str(path))
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert "quantization_config" not in config
    expected = {
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    model_map = map_checkpoint(checkpoint)
    assert (model_map.n_layers, model_map.d_model, len(model_map.writers)) == (LAYERS, D, 2 * LAYERS)


def test_its_tokenizer_and_template(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path)
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(path)).folder)
    assert tokenizer.chat_template == tiny.TEMPLATE
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the é"}], tokenize=False)
    assert prompt == "<|user|>the é<|end|>"
    tokens = vocabulary()
    spelled = ["<|user|>", "th", "e", "Ġ", "Ã", "©", "<|end|>"]
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == [tokens.index(token) for token in spelled]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_its_model_is_the_one_in_the_file(tmp_path: Path) -> None:
    """What llama.cpp and transformers read from one file agrees, so our values are its values in their places."""
    path = tmp_path / "tiny.gguf"
    values = write(path)
    ours = ChatModel.load(resolve(str(path)), LoadSettings(dtype="float32", device="cpu")).module
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(ours.get_parameter(query), values[query])
    ids = torch.tensor([[5, 9, 70, 200, 3]])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)


def test_a_second_time_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = tmp_path / "tiny.gguf", tmp_path / "copy.gguf"
    write(path)
    first = resolve(str(path))

    def fail(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(gguf_source, "write_tokenizer", fail)
    again = resolve(str(path))
    assert (again.folder, again.revision) == (first.folder, first.revision)
    path.rename(elsewhere)
    again = resolve(str(elsewhere))
    assert (again.folder, again.revision) == (first.folder, first.revision)
    write(path, q8=True)
    with pytest.raises(AssertionError, match="made again"):
        resolve(str(path))


def assert_nothing_left(cache: Path) -> None:
    assert not list((cache / "gguf-metadata").glob("*"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_truncated_file_is_one_error_and_leaves_nothing(tmp_path: Path, cache: Path, share: float) -> None:
    write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: max(4, int(len(data) * share))])
    with pytest.raises(ForgeError, match=r"cut\.gguf is truncated") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert_nothing_left(cache)


@pytest.mark.parametrize("name", ["blk.0.attn_norm"])
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path, name: str) -> None:
    """Else random weights would stand in for it."""
    path = tmp_path / "lacking.gguf"
    write(path, without=(name,))
    with pytest.raises(ForgeError) as caught:
        resolve(str(path))
    assert "\n" not in caught.value.message


def test_an_unknown_architecture_is_one_error(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "alien.gguf"
    write_bare(path, "alien", {})
    with pytest.raises(ForgeError, match="does not know the architecture 'alien'"):
        resolve(str(path))
    assert_nothing_left(cache)


def write_bare(path: Path, architecture: str, values: dict[str, Any]) -> None:
    """A file with one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "values", "words"),
    [
        ("llama", {"general.type": "adapter"}, "is a LoRA adapter"),
        ("clip", {"general.type": "mmproj"}, "is a projector"),
        ("clip", {}, "is a projector"),
        ("llama", {"general.type": "imatrix"}, "is an importance matrix"),
    ],
)
def test_what_is_no_model(tmp_path: Path, architecture: str, values: dict[str, Any], words: str) -> None:
    write_bare(tmp_path / "x.gguf", architecture, values)
    with pytest.raises(ForgeError, match=words):
        resolve(str(tmp_path / "x.gguf"))


def test_a_failed_write_leaves_no_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write(path)

    def fail(file: object, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_source, "write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(path))
    assert_nothing_left(cache)


# Split files


def split(folder: Path) -> tuple[list[Path], dict[str, torch.Tensor]]:
    """The tiny model in parts, as gguf-py splits it."""
    folder.mkdir()
    values = write(folder / "tiny.gguf", split_max_tensors=8)
    return sorted(folder.iterdir()), values


def test_the_parts_of_a_file_are_one_model(tmp_path: Path) -> None:
    parts, values = split(tmp_path / "parts")
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    found = [resolve(str(part)) for part in parts]
    assert_holds(found[0], values)
    assert len({(one.folder, one.revision, one.path) for one in found}) == 1  # type: ignore[attr-defined]
    file = found[0].file  # type: ignore[attr-defined]
    assert (file.path, file.parts) == (parts[0], tuple(parts))
    assert {tensor.file for tensor in file.tensors} == set(parts)
    other, _ = split(tmp_path / "other")
    with other[2].open("r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b"\x77")
    assert resolve(str(other[0])).revision != found[0].revision


def test_parts_that_are_missing_or_do_not_belong_together(tmp_path: Path) -> None:
    parts, _ = split(tmp_path / "parts")

    def refused(path: Path) -> ForgeError:
        with pytest.raises(ForgeError) as caught:
            resolve(str(path))
        assert "\n" not in caught.value.message
        return caught.value

    moved = parts[1].rename(tmp_path / "moved.gguf")
    lacking = refused(parts[2])
    assert "one of 3 parts, of which 1 are missing, such as tiny-00002-of-00003.gguf" in lacking.message
    assert str(tmp_path / "parts") in lacking.hint
    assert "under another name" in refused(moved).message
    shutil.copy(parts[2], parts[1])
    assert "is not part 2 of 3" in refused(parts[0]).message
    shutil.copy(moved, parts[1])
    resolve(str(parts[0]))
    twice = read_part(parts[0])
    assert "do not belong together" in str(
        joining_error([twice, replace(twice, metadata=read_part(parts[1]).metadata)])
    )


def joining_error(parts: list[Gguf]) -> ForgeError:
    """The error of parts that say to be two of two."""
    numbered = [
        replace(part, metadata={**part.metadata, "split.no": value_of(n), "split.count": value_of(len(parts))})
        for n, part in enumerate(parts)
    ]
    with pytest.raises(ForgeError) as caught:
        gguf_file._joined(numbered)
    return caught.value


# With a base


def test_a_file_has_the_config_and_tokenizer_of_its_base(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    values = write(path)
    made = resolve(str(path))
    config = {**made.config, "quantization_config": {"quant_method": "fp8"}}
    base = shutil.copytree(made.folder, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    shutil.rmtree(cache / "gguf-metadata")
    found = resolve_gguf(str(path), None, Checkpoint(base, "org/base", "hub"))
    assert (found.folder, found.label, found.kind) == (base, str(path), "gguf")
    assert found.revision == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_holds(found, values)
    assert "quantization_config" not in found.config
    assert not (cache / "gguf-metadata").exists()
    assert gguf_source.gguf_checkpoint_of(found, path).label == str(path)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path)
    base = shutil.copytree(resolve(str(path)).folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "head_dim": 8}))
    with pytest.raises(ForgeError):
        resolve_gguf(str(path), None, Checkpoint(base, "base", "folder"))


@pytest.mark.parametrize("model", ["org/model", "demo", "."])
def test_a_base_is_for_a_gguf_file(tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="--base is for a GGUF file"):
        resolve_gguf(model, None, Checkpoint(tmp_path, "base", "folder"))


# On the Hub


def test_a_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny-Q8_0.gguf"
    values = write(path)
    asked: list[tuple[GgufReference, str | None]] = []

    def fetch(reference: GgufReference, revision: str | None) -> Path:
        asked.append((reference, revision))
        return path

    monkeypatch.setattr(resolving, "fetch_gguf", fetch)
    found = resolve("hf.co/owner/tiny:Q8_0", "v2")
    assert (found.kind, found.label, found.public_name) == ("gguf", "hf.co/owner/tiny:Q8_0", "tiny-Q8_0.gguf")
    assert_holds(found, values)
    based = resolve_gguf("owner/tiny:Q8_0", None, found)
    assert (based.folder, based.label) == (found.folder, "owner/tiny:Q8_0")
    assert asked == [(GgufReference("owner/tiny", "Q8_0"), "v2"), (GgufReference("owner/tiny", "Q8_0"), None)]

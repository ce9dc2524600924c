"""A GGUF file as the source: it is unpacked once to a bf16 checkpoint with its values and its template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.errors import ForgeError
from ollama_forge.sources import dequantised as gguf_source
from ollama_forge.sources.resolve import resolve
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


def write(path: Path, half: bool = True, without: tuple[str, ...] = (), q8: bool = False) -> dict[str, torch.Tensor]:
    """A random llama; returns its values under their Hugging Face names, as the file holds them."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
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
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def held(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name: decode_tensor(checkpoint.tensors.read_bytes(name), info.dtype, info.shape)
        for name, info in checkpoint.tensors.items()
    }


@pytest.mark.parametrize("kind", ["half", "full", "q8"])
def test_the_values_of_the_file_are_those_of_the_checkpoint(tmp_path: Path, cache: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    values = write(path, half=kind == "half", q8=kind == "q8")
    checkpoint = resolve(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (checkpoint.kind, checkpoint.label, checkpoint.revision) == ("gguf", str(path), digest)
    assert checkpoint.folder.is_relative_to(cache)
    found = held(checkpoint)
    assert set(found) == set(values)
    for name, tensor in values.items():
        assert checkpoint.tensors[name].dtype == "BF16"
        assert torch.equal(found[name], tensor.bfloat16().float()), name
    assert not any(marked.name.endswith(".partial") for marked in cache.rglob("*"))


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
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    model_map = map_checkpoint(checkpoint)
    assert (model_map.n_layers, model_map.d_model, len(model_map.writers)) == (LAYERS, D, 2 * LAYERS)


def test_the_checkpoint_loads_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    values = write(path)
    folder = resolve(str(path)).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny.TEMPLATE
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the é"}], tokenize=False)
    assert prompt == "<|user|>the é<|end|>"
    tokens = vocabulary()
    spelled = ["<|user|>", "th", "e", "Ġ", "Ã", "©", "<|end|>"]
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == [tokens.index(token) for token in spelled]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    query = model.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert torch.equal(query.float(), values["model.layers.1.self_attn.q_proj.weight"].bfloat16().float())


def test_a_second_time_nothing_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = tmp_path / "tiny.gguf", tmp_path / "copy.gguf"
    write(path)
    first = resolve(str(path))

    def fail(*_: object) -> None:
        raise AssertionError("dequantised again")

    monkeypatch.setattr(gguf_source, "dequantise", fail)
    assert resolve(str(path)) == first
    path.rename(elsewhere)
    again = resolve(str(elsewhere))
    assert (again.folder, again.revision) == (first.folder, first.revision)
    write(path, without=("output_norm",))
    with pytest.raises(AssertionError, match="dequantised again"):
        resolve(str(path))


def assert_nothing_left(cache: Path) -> None:
    assert [path for path in cache.rglob("*") if path.name != "gguf"] == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.04, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_one_error_and_leaves_nothing(tmp_path: Path, cache: Path, share: float) -> None:
    write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: max(4, int(len(data) * share))])
    with pytest.raises(ForgeError, match=r"cut\.gguf cannot be read") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert_nothing_left(cache)


@pytest.mark.parametrize("name", ["blk.1.ffn_down", "blk.0.attn_norm", "output_norm", "token_embd"])
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path, cache: Path, name: str) -> None:
    """Else random weights would stand in for it."""
    path = tmp_path / "lacking.gguf"
    write(path, without=(name,))
    with pytest.raises(ForgeError):
        resolve(str(path))
    assert_nothing_left(cache)


def test_an_unknown_architecture_is_one_error(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "alien.gguf"
    writer = gguf.GGUFWriter(path, "alien")
    writer.add_name("alien")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ForgeError, match="cannot be read") as caught:
        resolve(str(path))
    assert "architecture" in caught.value.hint
    assert_nothing_left(cache)


def test_no_room_names_the_remedy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write(path)
    monkeypatch.setattr(gguf_source, "free_space", lambda _: 1000)
    with pytest.raises(ForgeError, match=r"needs about .* MB in .*, 1\.0 KB are free") as caught:
        resolve(str(path))
    assert "OLLAMA_FORGE_CACHE" in caught.value.hint
    assert_nothing_left(cache)


@pytest.mark.parametrize("kind", ["half", "full", "q8"])
def test_the_room_is_that_of_the_values_not_of_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """bf16 takes two bytes a value, whether the file holds four or one; in memory, the largest tensor thrice more."""
    path = tmp_path / "tiny.gguf"
    values = write(path, half=kind == "half", q8=kind == "q8")
    counts = [tensor.numel() for tensor in values.values()]
    disk, memory = 2 * sum(counts), 2 * sum(counts) + 6 * max(counts)

    def room(free_disk: int, free_memory: int) -> None:
        monkeypatch.setattr(gguf_source, "_COMPANION_BYTES", 0)
        monkeypatch.setattr(gguf_source, "free_space", lambda _: free_disk)
        monkeypatch.setattr(gguf_source, "available_memory", lambda: free_memory)

    room(disk - 1, memory)
    with pytest.raises(ForgeError, match="needs about"):
        resolve(str(path))
    room(disk, memory - 1)
    with pytest.raises(ForgeError, match=r"takes about .* of memory, .* are free"):
        resolve(str(path))
    assert_nothing_left(cache)
    room(disk, memory)
    written = sum(info.size for info in resolve(str(path)).tensors.values())
    assert written == disk


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_file_says_how_to_join_the_parts(tmp_path: Path, cache: Path, number: int) -> None:
    path = tmp_path / f"tiny-{number + 1:05}-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("output_norm.weight", np.ones(D, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ForgeError, match="one of the 2 parts") as caught:
        resolve(str(path))
    assert "llama-gguf-split --merge" in caught.value.hint
    assert_nothing_left(cache)


def test_a_failed_write_leaves_no_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write(path)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(path))
    assert_nothing_left(cache)

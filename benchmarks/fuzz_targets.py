"""The readers of foreign bytes: what each reads, and its seeds. Each refuses an input by ForgeError alone."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from ollama_forge.errors import ForgeError

Seeds = Mapping[str, bytes]
D_MODEL, LAYERS = 8, 2


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        what: what it reads.
        seeds: inputs by file name; a file keeps its name when it is mutated.
        read: reads the file at a path; other files of its folder are its own to write.
        seconds: that one input may take.
    """

    name: str
    what: str
    seeds: Callable[[], Seeds]
    read: Callable[[Path], object]
    seconds: int = 10

    @contextmanager
    def prepared(self, folder: Path) -> Iterator[None]:
        """A cache, a store and a current folder of its own."""
        places = {"OLLAMA_FORGE_CACHE": str(folder / "cache"), "OLLAMA_MODELS": str(folder / "store")}
        before = Path.cwd()
        with mock.patch.dict(os.environ, places), mock.patch("ollama_forge.progress.say"):
            try:
                yield
            finally:
                os.chdir(before)


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return bytes(save(dict(tensors), dict(metadata or {})))


def numbers(*shape: int) -> Any:
    import torch

    return torch.linspace(-1, 1, int(torch.Size(shape).numel())).reshape(shape)


def saved(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# -- lists and settings -----------------------------------------------------------------------------------------------


def list_seeds() -> Seeds:
    rows = [{"instruction": "Name a river.", "other": 1}, {"instruction": "Bake bread.", "other": None}]
    return {
        "list.txt": b"# a comment\nName a river.\n\nBake bread.\r\n",
        "list.csv": b'id,prompt\n1,"Name, a ""river"""\n2,Bake\n',
        "list.tsv": b"goal\tid\nName a river.\t1\n",
        "list.json": as_bytes({"data": rows, "more": [1]}),
        "list.jsonl": b"\n".join(map(as_bytes, rows)),
        "utf16.txt": "Name a river.\n".encode("utf-16"),
    }


def read_list(path: Path) -> None:
    from ollama_forge.prompts.sources import read_instructions

    read_instructions(path)


def conversation_seeds() -> Seeds:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    lines = [{"kind": "facts", "messages": turns, "language": "de"}, {"messages": turns[1:]}]
    return {"conversations.jsonl": b"\n".join(map(as_bytes, lines))}


def read_conversation_file(path: Path) -> None:
    from ollama_forge.prompts.conversation import read_conversations

    read_conversations(path)


def config_seeds() -> Seeds:
    return {"config.toml": b'model = "demo"\nseed = 3\n[run]\nname = "a"\nonly = [1, "b"]\n[runs.rm]\nyes = true\n'}


def read_config(path: Path) -> None:
    from ollama_forge.config_file import ConfigFile

    found = ConfigFile.read(path)
    found.of("run")
    found.check({"run": ["name", "only", "model", "seed"], "runs rm": ["yes"]})


# -- weights ----------------------------------------------------------------------------------------------------------


def shard_seeds() -> Seeds:
    return {"model.safetensors": safetensors({"a": numbers(2, 8), "b": numbers(4).half()}, {"format": "pt"})}


def read_shard(path: Path) -> None:
    from ollama_forge.checkpoints.tensors import CheckpointTensors

    tensors = CheckpointTensors(path.parent)
    tensors.read_all(list(tensors))


def index_seeds() -> Seeds:
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return {"model.safetensors.index.json": as_bytes({"metadata": {"total_size": 80}, "weight_map": files})}


def read_index(path: Path) -> None:
    from ollama_forge.checkpoints.tensors import CheckpointTensors

    for number, name in enumerate("ab", 1):
        (path.parent / f"model-{number}.safetensors").write_bytes(safetensors({name: numbers(2, 8)}))
    tensors = CheckpointTensors(path.parent)
    outside = [shard for shard in tensors.shards if not shard.resolve().is_relative_to(path.parent.resolve())]
    assert not outside, outside
    tensors.read_all(list(tensors))


def model_config_seeds() -> Seeds:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2,
        "eos_token_id": [1, 2], "vocab_size": 16, "text_config": {"hidden_size": 8},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4], "modules_to_not_convert": ["b"]},
    }  # fmt: skip
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False}
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8, "type": "int", "symmetric": True}}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {
        "config.json": as_bytes(config),
        "generation_config.json": as_bytes({"temperature": 0.5, "top_k": 3, "eos_token_id": 2, "do_sample": True}),
        **{
            f"{name}/config.json": as_bytes({**config, "quantization_config": entry})
            for name, entry in (("gptq", gptq), ("nf4", nf4), ("packed", packed), ("mxfp4", {"quant_method": "mxfp4"}))
        },
        "modules.json": as_bytes(
            [
                {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            ]
        ),
        "1_Pooling/config.json": as_bytes({"pooling_mode_mean_tokens": True, "include_prompt": False}),
    }


def read_model_config(path: Path) -> None:
    """The files of a checkpoint that say what it is; those that are not mutated are the seeds."""
    import torch

    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.ollama.sampling import sampling_parameters
    from ollama_forge.serving.sentence_modules import SentenceModules
    from ollama_forge.text.tokenizer import stored_end_ids

    folder = path.parent if path.parent.name in ("gptq", "nf4", "packed", "mxfp4") else top_of(path)
    seeds = cached_seeds(model_config_seeds)
    for name, data in seeds.items():
        place = folder / name
        if place != path and folder == top_of(path) and "/" not in name.removeprefix("1_Pooling/"):
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
    bytes_ = torch.zeros(8, 8, dtype=torch.uint8)
    weights = {"a.weight": bytes_, "a.weight_scale_inv": numbers(2, 2), "a.qweight": bytes_.int()}
    weights |= {"a.qzeros": torch.zeros(1, 1).int(), "a.scales": numbers(1, 8), "a.weight_packed": bytes_.int()}
    weights |= {"a.weight_scale": numbers(8, 1), "a.weight_blocks": bytes_[None, :, None], "b.weight": numbers(8, 8)}
    weights |= {"a.weight_scales": bytes_[None], "a.weight.absmax": numbers(2), "a.weight_shape": torch.tensor([8, 8])}
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # safetensors refuses shared storage
    (folder / "model.safetensors").write_bytes(safetensors(weights))
    checkpoint = Checkpoint(folder, "label", "folder")
    stored_end_ids(folder)
    failure = None
    for step in (
        lambda: (checkpoint.config, checkpoint.quantisation, checkpoint.has_stray_quantization_config),
        lambda: sampling_parameters(folder),
        lambda: SentenceModules.of(checkpoint),
        lambda: (checkpoint.parameters, [checkpoint.tensors.read_packed(name) for name in checkpoint.tensors.packed]),
    ):
        try:
            step()
        except ForgeError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def top_of(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "1_Pooling" else path.parent


@cache
def cached_seeds(seeds: Callable[[], Seeds]) -> Seeds:
    return seeds()


def pickle_seeds() -> Seeds:
    return {"pytorch_model.bin": saved({"a": numbers(2, 4), "b": numbers(3).half()})}


def read_pickle(path: Path) -> None:
    from ollama_forge.checkpoints.pickled import convert_pickled

    (path.parent / "config.json").write_bytes(b"{}")
    convert_pickled(path.parent, "label")
    shutil.rmtree(path.parent / "cache", ignore_errors=True)


# -- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file with these values and float32 tensors."""

    def value(one: Any) -> tuple[int, bytes]:
        match one:
            case bool():
                return 7, struct.pack("<?", one)
            case int():
                return 4, struct.pack("<I", one)
            case float():
                return 6, struct.pack("<f", one)
            case str():
                return 8, gguf_text(one)
        items = [value(item) for item in one]
        return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(raw for _, raw in items)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, one in metadata.items():
        kind, raw = value(one)
        head += gguf_text(key) + struct.pack("<I", kind) + raw
    at, data = 0, b""
    for name, shape in tensors.items():
        content = numbers(*shape).abs().numpy().tobytes()
        head += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, at)
        data += content + bytes(-len(content) % 32)
        at = len(data)
    return head + bytes(-len(head) % 32) + data


def gguf_seeds() -> Seeds:
    tokens = ["<unk>", "<s>", "</s>", "▁a", "b", "▁", "a", *(f"<0x{number:02X}>" for number in range(256))]
    metadata = {
        "general.architecture": "llama", "general.name": "a", "general.alignment": 32, "llama.block_count": 1,
        "llama.embedding_length": 4, "llama.context_length": 64, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [-float(at) for at in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, *[6] * 256], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}",
        "ollama_forge.source": json.dumps({"model": "a", "kind": "hub", "fingerprint": "f", "files": {"m.gguf": "0"}}),
    }  # fmt: skip
    byte_level = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b", "Ġ a"],
        "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "Ġ", "Ġa"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
    }  # fmt: skip
    shapes = {"token_embd.weight": (8, 4), "blk.0.attn_q.weight": (4, 4), "output_norm.weight": (4,)}
    return {"pieces.gguf": gguf(metadata, shapes), "bytes.gguf": gguf({**metadata, **byte_level}, shapes)}


def read_gguf_file(path: Path) -> None:
    from ollama_forge.checkpoints.gguf.file import read_gguf
    from ollama_forge.checkpoints.gguf.header import read_header, require_model
    from ollama_forge.edits.source_files import source_entry
    from ollama_forge.ollama.chat_template import FileTemplate
    from ollama_forge.sources.gguf_tokenizer import token_ids, write_tokenizer

    file = read_gguf(path)
    written = path.parent / "tokenizer"
    written.mkdir(exist_ok=True)
    failure = None
    for step in (
        lambda: read_header(path),
        lambda: require_model(file),
        lambda: FileTemplate.of(file).does_more,
        lambda: token_ids(file),
        lambda: source_entry(path),
        lambda: write_tokenizer(file, written),
    ):
        try:
            step()
        except ForgeError as error:
            failure = failure or error
    outside = [found for found in path.parent.iterdir() if found.name not in ("tokenizer", "cache", *gguf_names())]
    assert not outside, outside
    shutil.rmtree(written)
    if failure is not None:
        raise failure


def gguf_names() -> tuple[str, ...]:
    return tuple(cached_seeds(gguf_seeds))


def imatrix_seeds() -> Seeds:
    older = struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii4f", 2, 4, 1, 2, 3, 4) + struct.pack("<ii", 1, 1) + b"d"
    values = {"imatrix.datasets": ["d"], "imatrix.chunk_count": 1, "general.type": "imatrix"}
    return {"older.dat": older, "newer.gguf": gguf(values, {"a.in_sum2": (1, 4), "a.counts": (1, 1)})}


def read_importance(path: Path) -> None:
    from ollama_forge.export.imatrix import read_imatrix

    read_imatrix(path).metadata()


# -- directions and edits ---------------------------------------------------------------------------------------------


def direction_seeds() -> Seeds:
    sidecar = {"format": 1, "method": "m", "kind": "directions", "shape": [1, D_MODEL], "layer": 1.5, "position": -1}
    return {
        "one.pt": saved(numbers(1, D_MODEL)),
        "layers.pt": saved({"per_layer": True, "directions": numbers(LAYERS, D_MODEL)}),
        "differences.pt": saved(numbers(3, LAYERS, D_MODEL).half()),
        "beside.json": as_bytes({**sidecar, "seed": 0}),
    }


def read_direction(path: Path) -> None:
    from ollama_forge.directions.direction import RefusalDirection

    if path.suffix == ".json":
        path.with_suffix(".pt").write_bytes(saved(numbers(1, D_MODEL)))
    RefusalDirection.load(path.with_suffix(".pt"), D_MODEL, LAYERS).for_layer(0)


def edit_seeds() -> Seeds:
    entry = {"strength": 1.0, "rescale": "none", "source_hash": "0", "result_hash": "1", "relative_change": 0.1}
    header = {
        "format": 1,
        "factors": "f",
        "fingerprint": "p",
        "settings": {},
        "fitted_to": {},
        "matrices": {"a": entry},
    }
    factors = {"a.L": numbers(4, 1), "a.K": numbers(8, 1)}
    undo = {"format": 1, "files": [["m.safetensors", "0" * 64, [["kept", 4], ["same", "a"]]]]}
    rows = {"counts": numbers(2).long() + 2, "top": numbers(4, 3).long(), "log_probs": numbers(4, 3)}
    for name in ("prompts", "answers"):
        rows |= {name: numbers(3).long(), f"{name}.lengths": numbers(1).long() + 4}
    return {
        "a.edit.safetensors": safetensors({**factors, "b.delta": numbers(4)}, {"edit": json.dumps(header)}),
        "a.undo.safetensors": safetensors({"m.safetensors": numbers(4).byte()}, {"undo": json.dumps(undo)}),
        "fitted.safetensors": safetensors(factors, {"fitted_to": '{"prompts": {"harmful": 3}}'}),
        "reference.safetensors": safetensors(rows, {"max_new_tokens": "3"}),
    }


def read_edit(path: Path) -> None:
    from ollama_forge.edits.edit_file import EditRecord
    from ollama_forge.edits.fitted import FittedFactors
    from ollama_forge.edits.undo_file import read_undo

    match path.name:
        case "a.edit.safetensors":
            EditRecord.load(path)
        case "a.undo.safetensors":
            recipes, _ = read_undo(path)
            assert all(is_within(path.parent / recipe.name, path.parent) for recipe in recipes)
        case "fitted.safetensors":
            FittedFactors.load(path)
        case _:
            from ollama_forge.evaluation.divergence import Reference

            Reference.load(path)


def is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def adapter_seeds() -> Seeds:
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "base_model_name_or_path": "a/b", "use_rslora": True, "alpha_pattern": {"q": 3}, "rank_pattern": {},
        "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
    }  # fmt: skip
    name = "base_model.model.model.layers.0.q_proj"
    factors = {f"{name}.lora_A.weight": numbers(2, 8), f"{name}.lora_B.weight": numbers(8, 2)}
    return {
        "adapter_config.json": as_bytes(config),
        "adapter_model.safetensors": safetensors({**factors, "base_model.model.norm.weight": numbers(8)}),
        "bin/adapter_model.bin": saved(factors),
    }


def read_adapter_folder(path: Path) -> None:
    from ollama_forge.sources.peft_adapter import read_adapter

    seeds = cached_seeds(adapter_seeds)
    for name in ("adapter_config.json", *(() if path.suffix == ".bin" else ("adapter_model.safetensors",))):
        if path.name != name:
            (path.parent / name).write_bytes(seeds[name])
    read_adapter(str(path.parent))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_seeds() -> Seeds:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5, "\u2581": 6, "\u2581a": 7}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bpe = {
        "type": "BPE",
        "vocab": words,
        "merges": [["a", "b"], ["\u2581", "a"]],
        "unk_token": "<unk>",
        "fuse_unk": True,
    }
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": words[text], "content": text, **added} for text in ("<s>", "</s>", "<unk>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, replaced]},
        "pre_tokenizer": spaces, "post_processor": None, "decoder": spaces, "model": bpe,
    }  # fmt: skip
    pieces = [["<unk>", 0.0], ["\u2581", -1.0], ["a", -2.0], ["b", -3.0]]
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 100, "chat_template": template, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "tokenizer.json": as_bytes(tokenizer),
        "unigram/tokenizer.json": as_bytes({**tokenizer, "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}),
        "words/tokenizer.json": as_bytes(
            {**tokenizer, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}
        ),
        "bytes/tokenizer.json": as_bytes(
            {**tokenizer, "normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level}
        ),
        "tokenizer_config.json": as_bytes(settings),
        "generation_config.json": as_bytes({"eos_token_id": [1, 2]}),
    }


def read_tokenizer(path: Path) -> None:
    """Loads it, renders a turn, and encodes and decodes what it says."""
    from ollama_forge.text.tokenizer import Tokenizer

    seeds = cached_seeds(tokenizer_seeds)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if path.name != name:
            (path.parent / name).write_bytes(seeds[name])
    tokenizer = Tokenizer.load(path.parent, vocabulary=8)
    ids = tokenizer.instruction_ids("a ab\u00e9 b")
    tokenizer.decode([*ids, tokenizer.pad_id])
    assert tokenizer.thinking is None or tokenizer.thought is not None


# -- what a run wrote, read back --------------------------------------------------------------------------------------


def report_seeds() -> Seeds:
    figures = {"harmful": {"refusal": 3, "total": 4}, "damage": {"answer_kl": {"value": 0.1, "low": 0, "high": 1}}}
    report = {
        "kind": "run", "model": "demo", "choice": {"name": "c"}, "measurements": {"base": figures, "edited": figures},
        "verification": {"passed": True}, "ollama": {"made": True},
        "gguf": {"file": "x.gguf", "quant": "Q4_0", "others": [{"file": "y.gguf", "quant": "Q8_0"}]},
    }  # fmt: skip
    files = {"model.safetensors": "0" * 64}
    source = {"model": "a/b", "kind": "hub", "revision": "r", "fingerprint": "f", "files": files}
    provenance = {
        "version": "1", "source": source, "factors": "f", "direction": {"method": "m", "layer": 1, "position": -1},
        "settings": {"strength": 1}, "tensors": {"a": {"change": 0.1}}, "measurements": {"base": figures},
    }  # fmt: skip
    return {
        "x/report.json": as_bytes(report),
        "x/run.toml": b'model = "demo"\nname = "x"\nseed = 1\n[chosen]\nlayer = 3\n',
        "x/checkpoint/abliteration.json": as_bytes(provenance),
        "x/Modelfile": b"FROM ./x.gguf\nTEMPLATE {{ .Prompt }}\nSYSTEM a\nPARAMETER stop b\nPARAMETER top_k 3\n",
    }


def read_run(path: Path) -> None:
    """All that reads the output folder of a run: ``runs``, ``push``, ``serve`` and ``undo``."""
    from ollama_forge.cli.runs import _print
    from ollama_forge.comparison.report import require_own_folder
    from ollama_forge.edits.source_files import source_entry
    from ollama_forge.publishing.contents import contents
    from ollama_forge.runs import find_runs
    from ollama_forge.serving.run_facts import provenance_lines, report_figures

    top = next(parent for parent in path.parents if parent.name == "x")
    for name, data in cached_seeds(report_seeds).items():
        place = top.parent / name
        if place != path:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    for name in ("checkpoint/README.md", "checkpoint/config.json", "x.gguf", "y.gguf"):
        (top / name).write_bytes(b"{}")
    failure = None
    for step in (
        lambda: _print(find_runs(top.parent)),
        lambda: require_own_folder(top),
        lambda: source_entry(top / "checkpoint"),
        lambda: contents("x", "a/x", folder=top),
        lambda: provenance_lines(top / "checkpoint" / "abliteration.json"),
        lambda: report_figures(top / "checkpoint"),
    ):
        try:
            with mock.patch("builtins.print"):
                step()
        except ForgeError as error:
            failure = failure or error
    if failure is not None:
        raise failure


# -- Ollama -----------------------------------------------------------------------------------------------------------


def modelfile_seeds() -> Seeds:
    text = (
        'FROM ./a.gguf\nADAPTER ./b.gguf\n# comment\nTEMPLATE """{{ .System }}\n{{ .Prompt }}"""\nSYSTEM "a b"\n'
        "PARAMETER stop <|end|>\nPARAMETER num_ctx 4096\nMESSAGE user hello\nLICENSE MIT\nREQUIRES 0.9.0\nRENDERER a\n"
    )
    shown = {
        "modelfile": text, "template": "{{ .Prompt }}", "parameters": 'stop "a\\n"\ntop_k 3\nuse_mmap true\nseed <nil>',
        "system": "a b", "license": "MIT", "messages": [{"role": "user", "content": "a"}],
        "details": {"quantization_level": "Q4_0"}, "capabilities": ["completion", "tools"], "requires": "0.9",
    }  # fmt: skip
    return {"Modelfile": text.encode(), "show.json": as_bytes(shown)}


def read_modelfile(path: Path) -> None:
    from ollama_forge.ollama.modelfile import Modelfile, Unwritable
    from ollama_forge.ollama.shown import Shown

    if path.name == "Modelfile":
        found = Modelfile.parse(path.read_bytes().decode("utf-8", "replace"))
        try:
            text = found.text()
        except Unwritable:
            return
        assert Modelfile.parse(text) == found, "what is written is read otherwise"
        return
    try:
        answer = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(answer, dict):
        Shown.of("a", answer)


def store_seeds() -> Seeds:
    def layer(kind: str, letter: str) -> dict[str, Any]:
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{letter * 64}"}

    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": f"sha256:{'c' * 64}"}
    kinds = zip(("model", "template", "params", "messages", "license", "projector"), "abdefa", strict=True)
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "config": config,
        "layers": [layer(kind, letter) for kind, letter in kinds],
    }
    manifest["layers"][0]["size"] = 4
    return {
        "manifest": as_bytes(manifest),
        f"sha256-{'c' * 64}": as_bytes({"model_format": "gguf", "renderer": "r", "parser": "p", "requires": "0.9"}),
        f"sha256-{'d' * 64}": as_bytes({"stop": ["a", 1], "top_k": 3}),
        f"sha256-{'e' * 64}": as_bytes([{"role": "user", "content": "a"}]),
    }


def read_store(path: Path) -> None:
    from ollama_forge.sources.ollama_store import find_model

    store = path.parent / "store"
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "a" / "latest"
    seeds = cached_seeds(store_seeds)
    for folder in (manifest.parent, store / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    for letter in "abf":
        (store / "blobs" / f"sha256-{letter * 64}").write_bytes(b"GGUF")
    for name, data in seeds.items():
        (manifest if name == "manifest" else store / "blobs" / name).write_bytes(
            data if name != path.name else path.read_bytes()
        )
    found = find_model("a")
    blobs = (found.weights, *found.projectors, *found.adapters, *found.drafts)
    assert all(is_within(blob.path, store / "blobs") for blob in blobs)


# -- chat -------------------------------------------------------------------------------------------------------------


def template_seeds() -> Seeds:
    from tests.chat_templates import LEARNED

    templates = {f"{name}.jinja": text.encode() for name, text in LEARNED.items()}
    loop, end = "{% for a in range(99999) %}", "{% endfor %}"
    hostile = (
        "{{ 9 ** (9 ** 9) }}", "{{ 'a' * 10**9 }}", f"{loop}{loop}{{{{ a }}}}{end}{end}", "{{ 'a'|center(10**9) }}",
        f"{{% set n = namespace(t='a') %}}{loop}{{% set n.t = n.t ~ n.t %}}{end}", "{{ lipsum(n=9) }}",
        "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ '%099999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'a' %}", "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}{{ (1, 2)|list }}", "{% generation %}a{% endgeneration %}{{ tools|tojson }}",
    )  # fmt: skip
    return templates | {f"{number}.jinja": text.encode() for number, text in enumerate(hostile)}


def read_template(path: Path) -> None:
    from ollama_forge.serving.tools.families import family_of
    from ollama_forge.text import template_process
    from ollama_forge.text.template import Template, render_template
    from ollama_forge.text.template_renderer import TemplateRenderer

    text = path.read_bytes().decode("utf-8", "replace")
    template = Template(text)
    family_of(text)
    arguments = template.thinking_arguments(True)
    turns = [{"role": "user", "content": "Name a river."}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}] if template.takes_tools else []
    backend = TemplateRenderer({"bos_token": "<s>", "eos_token": "</s>"})
    with mock.patch.object(template_process, "SECONDS", 1.0):
        render_template(backend, text, turns, tools=tools, arguments=arguments)


def call_seeds() -> Seeds:
    from tests.test_tool_calls import FORMS, HARMONY_CALL, HARMONY_SUM

    seeds = {f"{name}.txt": b"\0".join(part.encode() for part in parts) for name, parts in FORMS.items()}
    return {**seeds, "harmony.txt": f"<|channel|>\0{HARMONY_CALL}\0{HARMONY_SUM}".encode()}


def read_calls(path: Path) -> None:
    """The first of the parts, between NUL, is the template; the others are answers, fed in pieces."""
    from ollama_forge.serving.output import parser_for
    from ollama_forge.serving.tools.families import family_of
    from ollama_forge.text.thinking import thinking_of

    template, *answers = path.read_bytes().decode("utf-8", "replace").split("\0")
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    two = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}}
    tools = {"get_weather": city, "add": two}
    for answer in answers:
        for step in (1, 7, len(answer) or 1):
            parser = parser_for(thinking_of(template), family_of(template), tools)
            deltas = [d for at in range(0, len(answer), step) for d in parser.feed(answer[at : at + step])]
            deltas += parser.end()
            json.dumps([call.arguments for delta in deltas for call in delta.tool_calls])


# -- HTTP -------------------------------------------------------------------------------------------------------------


def body_seeds() -> Seeds:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    function = {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    }
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
    options = {"temperature": 0, "num_predict": 4, "stop": ["x"], "top_k": 3, "seed": 1, "num_ctx": 64}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {
        "api+chat": as_bytes(
            {"model": "wire", "messages": [*turns, {"role": "assistant", "tool_calls": [{"function": {"name": "f",
             "arguments": {"a": 1}}}]}, {"role": "tool", "content": "c", "tool_name": "f"}, {"role": "user", "images":
             ["aGk="], "content": "d"}], "tools": [{"type": "function", "function": function}], "options": options,
             "format": schema, "stream": False, "think": False, "keep_alive": "5m", "logprobs": True}
        ),
        "api+generate": as_bytes(
            {"model": "wire", "prompt": "a", "suffix": "", "system": "s", "template": "{{ .Prompt }}",
             "context": [1, 2], "options": options, "stream": True, "raw": False, "format": "json", "keep_alive": -1}
        ),
        "api+embed": as_bytes({"model": "wire", "input": ["a", "b"], "truncate": True, "dimensions": 2}),
        "api+show": as_bytes({"model": "wire", "verbose": True}),
        "v1+chat+completions": as_bytes(
            {"model": "wire", "messages": [*turns, {"role": "assistant", "tool_calls": [call]}, {"role": "tool",
             "tool_call_id": "1", "content": [{"type": "text", "text": "c"}]}], "max_tokens": 4, "stream": True,
             "stream_options": {"include_usage": True}, "tools": [{"type": "function", "function": function}],
             "tool_choice": "auto", "logit_bias": {"5": 1}, "n": 1, "stop": "x", "response_format": {"type":
             "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}, "logprobs": True}
        ),
        "v1+completions": as_bytes({"model": "wire", "prompt": ["a"], "max_tokens": 4, "echo": True, "logprobs": 1}),
        "v1+embeddings": as_bytes({"model": "wire", "input": "a", "encoding_format": "base64"}),
        "v1+responses": as_bytes(
            {"model": "wire", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "tools":
             [{"type": "function", **function}], "instructions": "i", "max_output_tokens": 16, "stream": True, "text":
             {"format": {"type": "json_schema", "name": "n", "schema": schema}}, "reasoning": {"effort": "low"}}
        ),
        "v1+messages": as_bytes(
            {"model": "wire", "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "messages": [{"role": "user",
             "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": [{"type": "tool_use", "id":
             "t", "name": "f", "input": {}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
             "content": "c"}]}], "tools": [{"name": "f", "input_schema": function["parameters"]}], "stream": True,
             "tool_choice": {"type": "auto"}, "stop_sequences": ["x"], "thinking": {"type": "disabled"}}
        ),
    }  # fmt: skip


@cache
def application() -> tuple[Any, asyncio.AbstractEventLoop]:
    from tests.loopback import TOOLS, scripted

    from ollama_forge.serving.api.app import build_app
    from ollama_forge.serving.api.security import ServeSettings
    from ollama_forge.serving.registry import ModelRegistry

    return build_app(
        ModelRegistry(scripted(lambda *_: "hello", template=TOOLS)), ServeSettings()
    ), asyncio.new_event_loop()


def read_body(path: Path) -> None:
    import httpx

    app, loop = application()

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/" + path.name.replace("+", "/"), content=path.read_bytes(), headers=headers)

    answer = loop.run_until_complete(send())
    if answer.status_code >= 500:
        assert "internal server error" not in answer.text, answer.text
    if answer.status_code >= 400:
        assert "error" in answer.text or answer.status_code == 404, answer.text
        assert str(path.parent) not in answer.text


# -- studies ----------------------------------------------------------------------------------------------------------


def study_space() -> Any:
    from ollama_forge.search.space import Space

    return Space((3, 4, 5), 1.0)


def study_seeds() -> Seeds:
    """The journal of two trials, one of them of a ladder."""
    from ollama_forge.evaluation.counts import Counts
    from ollama_forge.search.candidates import least_squares_balanced
    from ollama_forge.search.ladder import Climbed
    from ollama_forge.search.rule import Limits, Rule, Trial
    from ollama_forge.search.study import FILE, Study

    def measured(candidate: Any, *_: object) -> Trial:
        edit = candidate.name, candidate.direction, candidate.settings
        return Trial(*edit, Counts("raaa"), 4, 0.01, 0.02, (0.01,))

    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), study_space(), {"model": "a"}, 0)
        study.begin(Climbed((measured(least_squares_balanced(4, 1.0, 0.0)),), ()))
        study.run(measured, Rule(Limits(), Counts("rrrr"), 0.0), 2)
        return {FILE: (Path(folder) / FILE).read_bytes()}


def read_study(path: Path) -> None:
    from ollama_forge.search.study import Study

    study = Study(path.parent, study_space(), {"model": "a"}, 0)
    study.trials()


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("lists", "lists of instructions", list_seeds, read_list),
        Target("conversations", "files of conversations", conversation_seeds, read_conversation_file),
        Target("config", "config files", config_seeds, read_config),
        Target("safetensors", "safetensors files", shard_seeds, read_shard),
        Target("index", "indexes of shards", index_seeds, read_index),
        Target("model-config", "configs of checkpoints", model_config_seeds, read_model_config),
        Target("pickles", "pickled weights", pickle_seeds, read_pickle),
        Target("gguf", "GGUF files, their vocabularies and templates", gguf_seeds, read_gguf_file),
        Target("imatrix", "importance matrices", imatrix_seeds, read_importance),
        Target("directions", "directions and their sidecars", direction_seeds, read_direction),
        Target("edits", "files of edits, of undoing and of runs' caches", edit_seeds, read_edit),
        Target("adapters", "LoRA adapters", adapter_seeds, read_adapter_folder),
        Target("tokenizers", "tokenizers of checkpoints", tokenizer_seeds, read_tokenizer),
        Target("studies", "journals of studies", study_seeds, read_study),
        Target("runs", "reports, settings and provenance of runs", report_seeds, read_run),
        Target("modelfiles", "Modelfiles and answers of /api/show", modelfile_seeds, read_modelfile),
        Target("store", "manifests of Ollama's store", store_seeds, read_store),
        Target("templates", "chat templates", template_seeds, read_template, seconds=120),
        Target("tool-calls", "answers with tool calls", call_seeds, read_calls),
        Target("bodies", "bodies of HTTP requests", body_seeds, read_body),
    )
}  # fmt: skip

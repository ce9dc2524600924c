"""A few damaged inputs for each reader of foreign bytes, and those that ``benchmarks/fuzz.py`` found faults with."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from fuzz import Fuzzer, fuzz
from fuzz_targets import TARGETS, as_bytes, cached_seeds, safetensors

RUNS = 40  # of each target


def changed(target: str, file: str, **values: Any) -> bytes:
    """A seed, of whose JSON object some values are replaced."""
    return as_bytes({**json.loads(TARGETS[target].seeds()[file]), **values})


def shards(*names: str) -> bytes:
    return as_bytes({"weight_map": {str(number): name for number, name in enumerate(names)}})


def packed(**groups: Any) -> bytes:
    """A config whose weights are compressed-tensors' with these groups."""
    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return changed("model-config", "packed/config.json", quantization_config=entry)


def header(entry: Mapping[str, Any]) -> bytes:
    text = as_bytes(entry)
    return len(text).to_bytes(8, "little") + text + bytes(64)


REPORT, PROVENANCE, INDEX = "x/report.json", "x/checkpoint/abliteration.json", "model.safetensors.index.json"
MESSAGES, SETTINGS = f"sha256-{'e' * 64}", f"sha256-{'d' * 64}"
FOUND: list[tuple[str, str, bytes]] = [
    ("conversations", "conversations.jsonl", b'{"messages": "\xde"}'),
    ("conversations", "conversations.jsonl", b'{"a":' * 5000),
    ("config", "config.toml", b"a = " + b"[" * 5000),
    ("config", "config.toml", b"a = " + b"9" * 5000),
    ("safetensors", "model.safetensors", header({"a": {"dtype": "a\nb", "shape": [1], "data_offsets": [0, 4]}})),
    ("index", INDEX, shards("a\nb")),
    ("index", INDEX, shards("x" * 300 + ".safetensors")),
    ("index", INDEX, b'{"weight_map": ' + b"9" * 5000 + b"}"),
    ("index", INDEX, b'{"a":' * 5000),
    ("adapters", "adapter_config.json", changed("adapters", "adapter_config.json", lora_alpha="", alpha_pattern=None)),
    ("adapters", "adapter_config.json", changed("adapters", "adapter_config.json", alpha_pattern="a")),
    ("adapters", "bin/adapter_model.bin", b""),
    ("model-config", "mxfp4/config.json", b"1"),
    ("model-config", "packed/config.json", packed(a=False)),
    ("model-config", "packed/config.json", packed(a={"weights": 7})),
    ("model-config", "packed/config.json", packed(a={"weights": {"num_bits": [4]}})),
    ("model-config", "packed/config.json", packed(a={"weights": "four"}).replace(b"format", b"foat")),
    ("tokenizers", "generation_config.json", b'{"eos_token_id": 0.5}'),
    ("tokenizers", "generation_config.json", b'{"eos_token_id": [""]}'),
    ("tokenizers", "generation_config.json", b"[" * 5000),
    ("tokenizers", "tokenizer_config.json", changed("tokenizers", "tokenizer_config.json", model_max_length=["a", 1])),
    ("studies", "study.journal", b"0.5\n"),
    ("studies", "study.journal", b"[" * 5000 + b"\n"),
    ("studies", "study.journal", b'{"op_code": "a", "worker_id": 7}\n'),
    ("bodies", "api+generate", as_bytes({"model": "wire", "prompt": "a", "keep_alive": "1" * 20000})),
    ("bodies", "api+generate", as_bytes({"model": "wire", "prompt": "a", "keep_alive": "1" * 5000 + "s"})),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", messages=7)),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", messages=[[]])),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", details="a")),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", parameters=[1])),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", modelfile=7)),
    ("modelfiles", "show.json", changed("modelfiles", "show.json", parameters="seed " + "9" * 5000)),
    ("edits", "reference.safetensors", header({})),
    ("edits", "reference.safetensors", safetensors({}, {"max_new_tokens": "many"})),
    ("edits", "fitted.safetensors", safetensors({}, {"fitted_to": "many"})),
    ("runs", REPORT, b"7"),
    ("runs", REPORT, changed("runs", REPORT, gguf=[])),
    ("runs", REPORT, changed("runs", REPORT, gguf={"file": "x.gguf"})),
    ("runs", REPORT, changed("runs", REPORT, gguf={"others": [0.5]})),
    ("runs", REPORT, changed("runs", REPORT, model=None)),
    ("runs", REPORT, changed("runs", REPORT, model="\ud800")),
    ("runs", REPORT, changed("runs", REPORT, measurements={"edited": {"damage": {"answer_kl": {"value": "a"}}}})),
    ("runs", PROVENANCE, b'"a"'),
    ("runs", PROVENANCE, changed("runs", PROVENANCE, direction=[], source="a")),
    ("runs", "x/Modelfile", b"FROM \xff"),
    ("store", "manifest", changed("store", "manifest", layers=7)),
    ("store", "manifest", changed("store", "manifest", layers=["a"])),
    ("store", "manifest", changed("store", "manifest", layers=[{"digest": f"sha256:{'a' * 64}", "size": "a"}])),
    ("store", "manifest", changed("store", "manifest", layers=[{"digest": "sha256:../../../../etc/passwd"}])),
    ("store", MESSAGES, b"[7]"),
    ("store", SETTINGS, b'{"a":' * 5000),
]


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"templates"}))  # test_hostile_templates.py has those
def test_damaged_input_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzzer = fuzz(TARGETS[name], tmp_path, runs=RUNS)
    assert fuzzer.runs >= RUNS
    assert len(fuzzer.reached) > 20
    assert not fuzzer.faults


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_was_found_stays_repaired(number: int, tmp_path: Path) -> None:
    name, file, data = FOUND[number]
    target = TARGETS[name]
    with target.prepared(tmp_path):
        fuzzer = Fuzzer(target, tmp_path, random.Random(0))
        fuzzer.attempt(file, data)
    assert not fuzzer.faults


def test_a_pickle_that_ends_in_the_middle_is_refused(tmp_path: Path) -> None:
    target, data = TARGETS["pickles"], cached_seeds(TARGETS["pickles"].seeds)["pytorch_model.bin"]
    with target.prepared(tmp_path):
        fuzzer = Fuzzer(target, tmp_path, random.Random(0))
        at = data.index(b"ctorch._utils")
        for place in range(at, at + 120, 3):
            fuzzer.attempt("pytorch_model.bin", data[:place] + b"." + data[place + 1 :])
    assert not fuzzer.faults

"""Synthetic checkpoints for benchmarks, a cold page cache, and the peak memory of a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_SHARD_LAYERS = 4
_MEASURED = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def write_llama(folder: Path, d: int, hidden: int, layers: int, *, vocabulary: int = 32000, tied: bool = False) -> int:
    """Write a Llama-shaped bf16 checkpoint whose layers have the same random weights; return its size in bytes.

    Args:
        d: width of the residual stream, a multiple of 128.
        hidden: neurons of an MLP.
        tied: store no head.
    """
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": d // 128,
        "num_key_value_heads": d // 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(d, hidden, layers, vocabulary, tied)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def _shards(d: int, hidden: int, layers: int, vocabulary: int, tied: bool) -> Iterator[dict[str, Tensor]]:
    ones = torch.ones(d, dtype=torch.bfloat16)
    outside = {"model.embed_tokens.weight": _random(vocabulary, d), "model.norm.weight": ones}
    yield outside if tied else {**outside, "lm_head.weight": _random(vocabulary, d)}
    layer = {f"self_attn.{name}_proj.weight": _random(d, d) for name in ("q", "k", "v", "o")}
    layer |= {f"mlp.{name}_proj.weight": _random(hidden, d) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": _random(d, hidden)}
    layer |= {f"{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    for first in range(0, layers, _SHARD_LAYERS):
        numbers = range(first, min(first + _SHARD_LAYERS, layers))
        yield {f"model.layers.{n}.{name}": value.clone() for n in numbers for name, value in layer.items()}


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measured(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak resident memory in bytes.

    Raises:
        CalledProcessError: the command failed.
    """
    parent = [sys.executable, "-c", _MEASURED]  # without other children, as the peak is the largest of them all
    with subprocess.Popen([*parent, *command], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the command too, or it would go on writing
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    seconds, peak = out.split()
    return float(seconds), int(peak)

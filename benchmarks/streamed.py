"""Memory and time of layer-streamed ``compute-dir`` on a synthetic Llama-shaped bf16 checkpoint, and of ``apply``.

    python benchmarks/streamed.py [FOLDER] [--gib 12] [--memory 3GiB] [--factors least-squares] [--no-depths]

The time is printed beside that of reading the files once with a cold page cache. Bounds: the peak resident memory of
``compute-dir`` is below ``--memory``, that of ``apply`` below 1 GiB; sixteen times the layers raise the former by less
than 10 %. Needs twice the size of the checkpoint on the disk of FOLDER (default: the system's temporary folder), and
for the depths 8 GB more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from checkpoints import forget, measured, write_llama
from ollama_forge.cli.options import MemorySize

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.byte_tokenizer import tokenizer

PAIRS = 32
VOCABULARY = 32000
GIB = 1 << 30
DEPTHS = (4, 16, 64)


def write_model(folder: Path, d: int, hidden: int, layers: int) -> int:
    """Write a checkpoint with a tokenizer; return the size of its weights in bytes."""
    size = write_llama(folder, d, hidden, layers, vocabulary=VOCABULARY)
    tokenizer().save_pretrained(folder)
    return size


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
    return measured([sys.executable, "-m", "ollama_forge.cli.main", "abliterate", *arguments])


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
    memory = MemorySize().convert(chosen.memory, None, None)
    if not isinstance(memory, int):
        parser.error("--memory: give a size such as 3GiB")
    missed = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        os.environ["OLLAMA_FORGE_CACHE"] = str(folder / "cache")
        d, hidden = 4096, 11008
        layer = 2 * (4 * d * d + 3 * d * hidden)
        layers = max(2, round((chosen.gib * GIB - 4 * VOCABULARY * d) / layer))
        size = write_model(folder / "model", d, hidden, layers)
        once = read_once(folder / "model")
        print(f"{size / GIB:.1f} GiB, {layers} layers; read once, cold: {once:.1f} s", flush=True)
        seconds, peak = compute_dir(folder / "model", chosen.memory, chosen.factors)
        passes = 19 if chosen.factors == "least-squares" else 1
        print(
            f"compute-dir --factors {chosen.factors}: {seconds:.1f} s ({seconds / once:.1f}x reading once, "
            f"{passes} passes), peak {peak / GIB:.2f} GiB",
            flush=True,
        )
        if peak > memory:
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

"""Memory and time of layer-streamed ``compute-dir`` on a synthetic Llama-shaped bf16 checkpoint, and of ``apply``.

    python benchmarks/streamed.py [FOLDER] [--gib 12] [--memory 3GiB] [--width 4096] [--factors least-squares]

The time is printed beside that of reading the files once with a cold page cache. Bounds: the peak resident memory of
``compute-dir`` is below ``--memory``, that of ``apply`` below 1 GiB; sixteen times the layers raise the former by less
than 10 %. Resident memory counts pages of mapped files, and not the page cache. FOLDER (default: the system's temporary
folder) needs twice the size of the checkpoint, at least 7 GiB for the depths; all of it is deleted, also after Ctrl-C
and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from checkpoints import forget, measured, write_llama
from ollama_forge.cli.options import MemorySize
from ollama_forge.prompts.general import general_prompts

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.byte_tokenizer import SPECIAL, TEMPLATE

PAIRS = 32
VOCABULARY = 32000
GIB = 1 << 30
DEPTHS = (4, 16, 64)
DEEP_WIDTH = 2048
LEAST_LAYERS = 4  # an edit leaves the first and the last one alone
SPARE = 1 << 30  # bytes of disk beside the checkpoints: hidden states, journals


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from the general prompts: four characters to a token, as with a tokenizer of a real model."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator([prompt.text for prompt in general_prompts()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def write_model(folder: Path, d: int, layers: int) -> int:
    """Write a checkpoint with a tokenizer; return the size of its weights in bytes."""
    size = write_llama(folder, d, mlp_width(d), layers, vocabulary=VOCABULARY)
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


def mlp_width(d: int) -> int:
    """Neurons of an MLP as in Llama 2: 11,008 for a residual stream of 4,096."""
    return d * 43 // 16


def layer_size(d: int) -> int:
    """Bytes of a decoder layer in bf16, without its norms."""
    return 2 * (4 * d * d + 3 * d * mlp_width(d))


def check_disk(folder: Path, gib: float, depths: bool) -> None:
    """End the program if the disk has too little space for the checkpoints."""
    needed = max(2 * gib * GIB, depths * DEPTHS[-1] * layer_size(DEEP_WIDTH)) + SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"{needed / GIB:.0f} GiB of disk are needed, {free / GIB:.0f} GiB are free at {folder}")


def measure_large(folder: Path, gib: float, d: int, memory: int, factors: str) -> list[str]:
    """Compute and apply an edit of a checkpoint of ``gib`` GiB; return the missed bounds."""
    missed, model, out = [], folder / "model", folder / "out"
    layers = max(LEAST_LAYERS, round((gib * GIB - 4 * VOCABULARY * d) / layer_size(d)))
    size = write_model(model, d, layers)
    once = read_once(model)
    print(f"{size / GIB:.1f} GiB, {layers} layers; read once, cold: {once:.1f} s", flush=True)
    seconds, peak = compute_dir(model, str(memory), factors)
    passes = 19 if factors == "least-squares" else 1
    print(
        f"compute-dir --factors {factors}: {seconds:.1f} s ({seconds / once:.1f}x reading once, {passes} passes), "
        f"peak {peak / GIB:.2f} GiB",
        flush=True,
    )
    if peak > memory:
        missed.append(f"compute-dir took {peak / GIB:.2f} GiB of {memory / GIB:.2f}")
    edit = ["--edit", str(folder / "refusal.edit.safetensors")]
    source = edit if factors == "least-squares" else ["--refusal-pt", str(folder / "refusal.pt")]
    forget(model)
    seconds, peak = run(["apply", "--model", str(model), "--output-dir", str(out), *source])
    print(f"apply: {seconds:.1f} s ({seconds / once:.1f}x reading once), peak {peak / GIB:.2f} GiB", flush=True)
    if peak > GIB:
        missed.append(f"apply took {peak / GIB:.2f} GiB")
    shutil.rmtree(out)
    shutil.rmtree(model)
    return missed


def measure_depths(folder: Path) -> list[str]:
    """Compare the memory of ``compute-dir`` for 1, 4 and 16 times as many layers; return the missed bounds."""
    peaks = []
    for depth in DEPTHS:
        write_model(folder / "deep", DEEP_WIDTH, depth)
        _, peak = compute_dir(folder / "deep", "1.2GiB", "orthogonal", more=("--per-layer-directions",))
        print(f"{depth} layers: peak {peak / GIB:.3f} GiB", flush=True)
        peaks.append(peak)
        shutil.rmtree(folder / "deep")
    return ["the memory grows with the layers"] if peaks[-1] > 1.1 * peaks[0] else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--gib", type=float, default=12)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--width", type=int, default=4096, help="of the residual stream, a multiple of 128")
    parser.add_argument("--factors", default="least-squares")
    parser.add_argument("--no-depths", action="store_true")
    chosen = parser.parse_args()
    memory = MemorySize().convert(chosen.memory, None, None)
    if not isinstance(memory, int):
        parser.error("--memory: give a size such as 3GiB")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the folder is deleted
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        check_disk(folder, chosen.gib, not chosen.no_depths)
        os.environ["OLLAMA_FORGE_CACHE"] = str(folder / "cache")
        missed = measure_large(folder, chosen.gib, chosen.width, memory, chosen.factors)
        if not chosen.no_depths:
            missed += measure_depths(folder)
    for line in missed:
        print(f"missed: {line}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()

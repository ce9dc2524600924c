"""Time of converting and quantising the demo model; if llama.cpp's quantiser is installed, compared with it.

    python benchmarks/quantise.py [LLAMA_QUANTIZE]

Bound: the embedded quantiser takes at most 3x the time of ``llama-quantize`` (medians of three alternating runs). Also
prints the time of the conversion, peak memory, and the first-token KL of quantising alone.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
QUANT = "Q4_K_M"
SOURCE_OF_CHILD = """
import resource, sys
from pathlib import Path
from ollama_forge.export.quantise import quantise
quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def quantising_costs(model: str, folder: Path, quant: str = QUANT) -> float:
    """Mean answer KL (nats a token) between a model and its quantised file on the general report prompts."""
    from ollama_forge.checkpoints.gguf.converter import find_converter
    from ollama_forge.edits.registry import max_pairs
    from ollama_forge.evaluation.divergence import Reference, divergence
    from ollama_forge.evaluation.measure import GENERAL_TOKENS, general_ids
    from ollama_forge.export.convert import convert
    from ollama_forge.export.quantise import quantise
    from ollama_forge.models.chat_model import ChatModel, LoadSettings
    from ollama_forge.prompts.settings import PromptSettings
    from ollama_forge.sources.gguf import gguf_checkpoint_of
    from ollama_forge.sources.resolve import resolve

    source = resolve(model)
    if not (folder / "converted.gguf").exists():
        convert(find_converter(None), source, folder / "converted.gguf", outtype="auto", name="demo")
    quantise(folder / "converted.gguf", folder / "quantised.gguf", quant, {})
    prompts = PromptSettings().load(max_pairs()).report
    chat = ChatModel.load(source, LoadSettings())
    reference = Reference.of(chat, general_ids(chat.tokenizer, prompts), GENERAL_TOKENS)
    file = ChatModel.load(gguf_checkpoint_of(source, folder / "quantised.gguf"), LoadSettings())
    return divergence(file, reference).answer_kl.value


def timed(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def main() -> int:
    from ollama_forge.checkpoints.gguf.converter import find_converter
    from ollama_forge.export.convert import convert
    from ollama_forge.export.quantise import find_tool
    from ollama_forge.sources.resolve import resolve

    tool = sys.argv[1] if len(sys.argv) > 1 else find_tool()
    source = resolve("demo")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        converted = folder / "converted.gguf"
        started = time.perf_counter()
        convert(find_converter(None), source, converted, outtype="auto", name="demo")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"converting: {time.perf_counter() - started:.1f} s, peak {peak:.0f} MB")
        embedded, native = [], []
        out = str(folder / "out.gguf")
        for _ in range(ROUNDS):
            seconds, said = timed([sys.executable, "-c", SOURCE_OF_CHILD, str(converted), out, QUANT])
            embedded.append(seconds)
            if tool:
                native.append(timed([tool, str(converted), out, QUANT])[0])
        peak_kilobytes = int(said)
        took = statistics.median(embedded)
        peak = f"peak {peak_kilobytes / 1024:.0f} MB"
        print(f"embedded quantiser, {QUANT}, with the start of the interpreter: {took:.2f} s, {peak}")
        ratio = 0.0
        if tool:
            ratio = took / statistics.median(native)
            print(
                f"llama-quantize: {statistics.median(native):.2f} s; the embedded one takes {ratio:.2f} times as long"
            )
        else:
            print("llama-quantize is not on PATH, so there is no comparison")
        print(f"first-token KL of quantising alone: {quantising_costs('demo', folder):.4f}")
    return 0 if ratio <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time of ``compute-dir`` on the demo model, compared with transformers' ``output_hidden_states`` prompt by prompt.

    python benchmarks/compute_dir.py

Bounds: ``compute-dir`` is at least 3x as fast and finds the same direction (cosine above 0.9999). Both compute in
float32, as rounding to bf16 depends on the batch. Neither time includes loading the model.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.prompts.split import PartPrompts, split_prompts
from ollama_forge.sources.resolve import resolve

ROUNDS = 3


@torch.inference_mode()
def one_at_a_time(model: ChatModel, fit: PartPrompts, layer: int) -> torch.Tensor:
    means = []
    for prompts in (fit.harmful, fit.harmless):
        total = torch.zeros(model.model_map.d_model, dtype=torch.float64)
        for prompt in prompts:
            ids = torch.tensor([model.tokenizer.instruction_ids(prompt)], device=model.device)
            states = model.module(input_ids=ids, output_hidden_states=True).hidden_states
            total += states[layer + 1][0, -1].double().cpu()
        means.append(total / len(prompts))
    gap = means[0] - means[1]
    return gap / gap.norm()


def main() -> int:
    source = resolve("demo")
    model = ChatModel.load(source, LoadSettings(dtype="float32"))
    fit = split_prompts().fit
    compute_direction(model, fit.first(4), DirectionSettings(), fingerprint=source.fingerprint)  # warm-up
    ratios, cosine = [], 0.0
    for _ in range(ROUNDS):
        started = time.perf_counter()
        found = compute_direction(model, fit, DirectionSettings(), fingerprint=source.fingerprint)
        ours = time.perf_counter() - started
        started = time.perf_counter()
        theirs = one_at_a_time(model, fit, int(found.layer or 0))
        baseline = time.perf_counter() - started
        ratios.append(baseline / ours)
        cosine = float(theirs @ found.vectors[0].double())
        print(f"compute-dir {ours:.2f} s, one at a time {baseline:.2f} s, ratio {ratios[-1]:.2f}, cosine {cosine:.8f}")
    ratio = statistics.median(ratios)
    print(f"median ratio {ratio:.2f}")
    return 0 if ratio >= 3 and cosine > 0.9999 else 1


if __name__ == "__main__":
    sys.exit(main())

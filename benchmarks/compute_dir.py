"""Time of ``compute-dir`` on the demo model, compared with transformers' ``output_hidden_states`` prompt by prompt.

    python benchmarks/compute_dir.py

Bounds: ``compute-dir`` is at least 3x as fast and finds the same direction (cosine above 0.9999). Both compute in
float32, as rounding to bf16 depends on the batch. Neither time includes loading the model. The ratio of the processor
times is printed too, which other programs on the machine change less.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.prompts.split import PartPrompts, split_prompts
from ollama_forge.sources.resolve import resolve

ROUNDS = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a call returned, its seconds, and those of the processor in all threads."""

    value: T
    wall: float
    processor: float


def timed(call: Callable[[], T]) -> Timed[T]:
    wall, processor = time.perf_counter(), time.process_time()
    value = call()
    return Timed(value, time.perf_counter() - wall, time.process_time() - processor)


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
        found = timed(lambda: compute_direction(model, fit, DirectionSettings(), fingerprint=source.fingerprint))
        theirs = timed(partial(one_at_a_time, model, fit, int(found.value.layer or 0)))
        ratios.append(theirs.wall / found.wall)
        cosine = float(theirs.value @ found.value.vectors[0].double())
        print(
            f"compute-dir {found.wall:.2f} s, one at a time {theirs.wall:.2f} s, ratio {ratios[-1]:.2f} "
            f"(processor {theirs.processor / found.processor:.2f}), cosine {cosine:.8f}"
        )
    ratio = statistics.median(ratios)
    print(f"median ratio {ratio:.2f}")
    return 0 if ratio >= 3 and cosine > 0.9999 else 1


if __name__ == "__main__":
    sys.exit(main())

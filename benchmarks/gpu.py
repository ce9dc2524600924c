"""What the program does on a CUDA GPU: is it right there, and how fast.

    python benchmarks/gpu.py [--only engine,live,speed,…] [--layers 16] [--width 2048] [--limit SECONDS]

Prints a row for each check, and goes on when one fails or takes longer than the limit. Tiny random models of many
families are compared with transformers' ``generate`` (``engine``, ``live``), with the CPU (``compute``), and as halves
on the CPU and on the device (``split``); a random bf16 Llama-shaped model of a billion weights, made on the device,
shows the speed beside ``generate`` and transformers' continuous batching (``speed``, ``batching``) and where a step's
time goes (``steps``, ``sampler``), and one on disk the times of ``compute-dir`` (``large``) and ``apply`` (``apply``).

Needs the extra ``dev``.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


class Table:
    """Runs checks and prints a row for each; ``failed`` has the names of those that raised an error."""

    def __init__(self, limit: int) -> None:
        self.failed: list[str] = []
        self.limit = limit

    def check(self, name: str, work: Callable[[], str]) -> None:
        started = time.perf_counter()
        signal.alarm(self.limit)
        try:
            result = work()
        except Exception as error:
            signal.alarm(0)
            self.failed.append(name)
            place = traceback.extract_tb(error.__traceback__)[-1]
            lines = str(error).splitlines() or [""]
            result = f"FAILED {type(error).__name__}: {lines[0][:160]} ({Path(place.filename).name}:{place.lineno})"
        signal.alarm(0)
        print(f"{name:<28} {time.perf_counter() - started:6.1f} s  {result}", flush=True)


def _end(*_: object) -> None:
    raise TimeoutError("it took too long")


SECTIONS = (
    "engine", "live", "split", "speed", "batching", "steps", "sampler", "compute", "large", "edits", "apply",
)  # fmt: skip


def main() -> int:
    import gpu_compute
    import gpu_engine

    sections = SECTIONS
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(sections))
    parser.add_argument("--families", help="some of them, for engine and compute")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=600, help="seconds for a check")
    chosen = parser.parse_args()
    only, some = chosen.only.split(","), (chosen.families or "").split(",") if chosen.families else []
    if unknown := set(only) - set(sections):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    reasons = logging.getLogger("ollama_forge.serving.engine.cuda_graphs")  # says why a model has no graphs
    reasons.setLevel(logging.INFO)
    reasons.addHandler(logging.StreamHandler(sys.stdout))
    device = torch.device(chosen.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}", flush=True)
    signal.signal(signal.SIGALRM, _end)
    table = Table(chosen.limit)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "engine" in only:
            for family in some or gpu_engine.FAMILIES:
                table.check(f"engine: {family}", partial(gpu_engine.family, family, device))
            for each in gpu_engine.FEATURES:
                table.check(f"engine: {each.__name__}", partial(each, device))
        if "live" in only:
            table.check("engine: live", partial(gpu_engine.live, device, root))
        if "split" in only:
            for family in some or gpu_compute.FAMILIES:
                table.check(f"split: {family}", partial(gpu_compute.split_family, family, device, root / f"s-{family}"))
            table.check("split: engine", partial(gpu_engine.split_engine, device))
            table.check("split: --device-map", partial(gpu_compute.device_map, device, root / "mapped"))
        if "batching" in only:
            gpu_engine.batching(table.check, device, chosen.layers, chosen.width)
        if "sampler" in only:
            gpu_engine.sampler(table.check, device)
        if "speed" in only:
            gpu_engine.speed(table.check, device, chosen.layers, chosen.width)
        if "steps" in only:
            gpu_engine.steps(table.check, device, chosen.layers, chosen.width)
        if "compute" in only:
            for family in some or gpu_compute.FAMILIES:
                table.check(f"compute: {family}", partial(gpu_compute.family, family, device, root / family))
        if "large" in only:
            gpu_compute.large(table.check, device, root, chosen.layers, chosen.width)
        if "apply" in only:
            gpu_compute.apply_times(table.check, device, root, chosen.layers, chosen.width)
        if "edits" in only:
            table.check("edits: a matrix", partial(gpu_compute.edits, device))
    print(f"failed: {', '.join(table.failed)}" if table.failed else "all checks passed")
    return bool(table.failed)


if __name__ == "__main__":
    sys.exit(main())

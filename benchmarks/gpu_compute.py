"""``compute-dir``, edits and divergences on a GPU; see ``gpu.py``."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests import families as more_families
from tests import tiny

from checkpoints import write_llama
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.factors import RemoveFromOutput, Rescale, edit_matrix
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.registry import method, settings_of
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import release_memory
from ollama_forge.models.streamed import load_streamed
from ollama_forge.prompts.split import PartPrompts

Check = Callable[[str, Callable[[], str]], None]
FAMILIES = ("llama", "gemma3", "gpt_oss", "mixtral", "deepseek_v3", "qwen3_next", "bloom")
ROOM = 1 << 30
PAIRS = 64


def save(name: str, folder: Path) -> Checkpoint:
    if name in more_families.FAMILIES:
        return more_families.save(name, folder)
    return tiny.save(tiny.build(name), folder)


def results(
    model: ChatModel, source: Checkpoint, fit: PartPrompts, *, fits: bool = True, divergences: bool = True
) -> dict[str, Any]:
    """The direction, the fitted keys and the divergence of the edit; ``seconds`` of the first two."""
    started = time.perf_counter()
    direction = compute_direction(model, fit, DirectionSettings(), fingerprint=source.fingerprint)
    computed = time.perf_counter()
    settings, read = settings_of("least-squares", {}), vector_reader(source.tensors)
    context = FitContext(model, fit, read, 0)
    fitted = FittedFactors()
    if fits:
        fitted = method("least-squares").fit(context, settings, {"direction": direction})["direction"]
    done = time.perf_counter()
    found: dict[str, Any] = {"direction": direction.vectors, "seconds": (computed - started, done - computed)}
    found |= {f"key of {name}": factors.K for name, factors in fitted.by_tensor.items()}
    if divergences:
        orthogonal = method("orthogonal")
        plan = orthogonal.plan(model.model_map, direction, FittedFactors(), settings_of("orthogonal", {}), read)
        prompts = model.tokenizer.instructions_ids(list(fit.harmless[:4]))
        reference = Reference.of(model, prompts, 6)
        with hooked(model, plan) as edited:
            moved = divergence(edited, reference)
        found["answers"] = reference.answers
        found["KL"] = torch.tensor([moved.answer_kl.value, moved.first_token_kl.value])
    return found


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The largest relative differences of the direction, of the keys and of the divergences."""
    if found.get("answers") != expected.get("answers"):
        raise ValueError("the greedy answers differ")
    worst: dict[str, float] = {}
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            kind = name.split()[0]
            other = found[name].to(tensor)
            difference = float((other - tensor).norm() / tensor.norm().clamp_min(1e-9))
            worst[kind] = max(worst.get(kind, 0.0), difference)
    return ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())


def family(name: str, device: torch.device, folder: Path) -> str:
    source = save(name, folder)
    model_map = map_checkpoint(source)
    fit = PartPrompts(tuple(tiny.lines(12, 1)), tuple(tiny.lines(12, 2)))
    here, there = (LoadSettings(dtype="float32", device=each, batch_size=4) for each in ("cpu", str(device)))
    expected = results(ChatModel.load(source, here, model_map), source, fit)
    found = results(ChatModel.load(source, there, model_map), source, fit)
    streamed = results(load_streamed(source, there, model_map, ROOM), source, fit)
    return (
        f"from the CPU: {largest_difference(found, expected)}; streamed from whole: "
        f"{largest_difference(streamed, found)}"
    )


def large(check: Check, device: torch.device, root: Path, layers: int, width: int) -> None:
    """Times on a bf16 checkpoint: on the CPU, on the device, streamed to it, and in 8 bits."""
    state: dict[str, Any] = {}
    fit = PartPrompts(tuple(tiny.lines(PAIRS, 1)), tuple(tiny.lines(PAIRS, 2)))

    def write() -> str:
        size = write_llama(root / "large", width, 4 * width, layers)
        tiny.tokenizer().save_pretrained(root / "large")
        state["source"] = source = Checkpoint(root / "large", "large", "folder")
        state["map"] = map_checkpoint(source)
        return f"{size / 2**30:.1f} GiB"

    def times(name: str, load: Callable[[], ChatModel], *, fits: bool = True) -> str:
        started = time.perf_counter()
        model = load()
        loaded = time.perf_counter() - started
        found = results(model, state["source"], fit, fits=fits, divergences=False)
        del model
        release_memory()
        state[name] = found
        direction, fitted = found["seconds"]
        line = f"load {loaded:.1f} s, direction {direction:.2f} s, least squares {fitted:.2f} s"
        expected = state.get("device")
        if expected is None or expected is found:
            return line
        cosine = float((found["direction"] @ expected["direction"].T).abs())
        return f"{line}; cosine with the device's {cosine:.6f}"

    def settings(each: torch.device, **more: Any) -> LoadSettings:
        return LoadSettings(dtype="bfloat16", device=str(each), **more)

    def whole(each: torch.device, **more: Any) -> Callable[[], ChatModel]:
        return lambda: ChatModel.load(state["source"], settings(each, **more), state["map"])

    check("large: write and map", write)
    check("large: device", lambda: times("device", whole(device)))
    check("large: device again", lambda: times("again", whole(device)))

    def in_8_bits() -> str:
        started = time.perf_counter()
        model = whole(device, load_in_8bit=True)()
        loaded = time.perf_counter() - started
        direction = compute_direction(model, fit, DirectionSettings(), fingerprint=state["source"].fingerprint)
        cosine = float((direction.vectors @ state["device"]["direction"].T).abs())
        return f"load {loaded:.1f} s, in all {time.perf_counter() - started:.1f} s; cosine with bf16 {cosine:.4f}"

    if importlib.util.find_spec("bitsandbytes") is not None:
        check("large: 8 bits", in_8_bits)
    check("large: CPU, direction", lambda: times("cpu", whole(torch.device("cpu")), fits=False))
    for gib, fits in ((1, False), (4, True)):
        streamed = lambda gib=gib: load_streamed(state["source"], settings(device), state["map"], gib << 30)  # noqa: E731
        check(f"large: streamed, {gib} GiB", lambda s=streamed, f=fits: times("streamed", s, fits=f))  # type: ignore[misc]


def edits(device: torch.device) -> str:
    """The edit of a bf16 matrix in host memory, with the copies to the device and back."""
    lines = []
    for size in (2048, 8192):
        weight = torch.randn(size, size, dtype=torch.bfloat16)
        rule = RemoveFromOutput(torch.nn.functional.normalize(torch.randn(size, 1), dim=0))

        def edited(on: torch.device, weight: torch.Tensor = weight, rule: RemoveFromOutput = rule) -> torch.Tensor:
            moved = RemoveFromOutput(rule.basis.to(on))
            return edit_matrix(weight.to(on).float(), moved, 1.0, Rescale.COLUMNS).weight.bfloat16().cpu()

        seconds = []
        for each in (torch.device("cpu"), device):
            edited(each)
            started = time.perf_counter()
            for _ in range(5):
                edited(each)
            seconds.append((time.perf_counter() - started) / 5)
        difference = (edited(device).float() - edited(torch.device("cpu")).float()).abs().max()
        lines.append(
            f"{size}x{size}: CPU {1e3 * seconds[0]:.1f} ms, device {1e3 * seconds[1]:.1f} ms, "
            f"differ by {difference:.1e}"
        )
    return "; ".join(lines)

"""``compute-dir``, edits and divergences on a GPU; see ``gpu.py``."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests import families as more_families
from tests import tiny
from tests.split_models import split

from checkpoints import write_llama
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits import blocks
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.factors import RemoveFromOutput, Rescale, edit_matrix
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.registry import method, settings_of
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import DEVICE_MAPS, release_memory
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


def split_family(name: str, device: torch.device, folder: Path) -> str:
    """Halves of the layers on the CPU and on the device, in both orders, against the whole model on the CPU."""
    source = save(name, folder)
    model_map = map_checkpoint(source)
    fit = PartPrompts(tuple(tiny.lines(12, 1)), tuple(tiny.lines(12, 2)))
    settings = LoadSettings(dtype="float32", device="cpu", batch_size=4)
    expected = results(ChatModel.load(source, settings, model_map), source, fit)
    lines = []
    for devices in ((torch.device("cpu"), device), (device, torch.device("cpu"))):
        model = split(ChatModel.load(source, settings, model_map), model_map.layers, devices)
        lines.append(f"first on {devices[0]}: {largest_difference(results(model, source, fit), expected)}")
    return "; ".join(lines)


def device_map(device: torch.device, folder: Path) -> str:
    """The option itself, on as many devices as there are."""
    source = save("llama", folder)
    model_map = map_checkpoint(source)
    fit = PartPrompts(tuple(tiny.lines(12, 1)), tuple(tiny.lines(12, 2)))
    settings = LoadSettings(dtype="float32", device=str(device), batch_size=4)
    expected = results(ChatModel.load(source, settings, model_map), source, fit)
    lines = []
    for name in DEVICE_MAPS:
        model = ChatModel.load(source, replace(settings, device="auto", device_map=name), model_map)
        found = largest_difference(results(model, source, fit), expected)
        lines.append(f"{name} on {', '.join(map(str, model.devices))}: {found}")
    return "; ".join(lines)


def apply_times(check: Check, device: torch.device, root: Path, layers: int, width: int) -> None:
    """``apply`` on the CPU, and with each block edited on the device and brought back."""
    write_llama(root / "applied", width, 4 * width, layers)
    source = Checkpoint(root / "applied", "applied", "folder")
    model_map = map_checkpoint(source)
    direction = RefusalDirection(torch.nn.functional.normalize(torch.randn(1, width)), layer=layers // 2)
    on_cpu, length = blocks.edit_matrix, blocks.CACHED_BLOCK

    def on_device(weight: torch.Tensor, rule: Any, *more: Any) -> Any:
        moved = replace(rule, **{f.name: to_device(getattr(rule, f.name)) for f in fields(rule)})
        edited = on_cpu(weight.to(device), moved, *more)
        return replace(edited, **{f.name: to_cpu(getattr(edited, f.name)) for f in fields(edited)})

    def to_device(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def to_cpu(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.cpu()
        return (
            replace(value, **{f.name: to_cpu(getattr(value, f.name)) for f in fields(value)})
            if is_dataclass(value)
            else value
        )

    def seconds(edit: Any, block: int, norm_preserving: bool) -> float:
        settings = EditSettings(norm_preserving=norm_preserving)
        plan = method("orthogonal").plan(model_map, direction, FittedFactors(), settings, vector_reader(source.tensors))
        blocks.edit_matrix, blocks.CACHED_BLOCK = edit, block
        started = time.perf_counter()
        try:
            write_checkpoint(source, model_map, plan, root / "out", settings=None)
        finally:
            blocks.edit_matrix, blocks.CACHED_BLOCK = on_cpu, length
        taken = time.perf_counter() - started
        for folder in root.glob("out*"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        return taken

    def times(edit: Any, block: int) -> str:
        found = [seconds(edit, block, norm) for norm in (False, False, True)]
        return f"{found[0]:.2f} and {found[1]:.2f} s; with the norm rule {found[2]:.2f} s"

    check("apply: CPU", lambda: times(on_cpu, length))
    check("apply: device", lambda: times(on_device, length))
    check("apply: device, large blocks", lambda: times(on_device, blocks.BLOCK))


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

    def in_bits(bits: int, on: torch.device = device) -> str:
        release_memory()
        before, started = torch.cuda.memory_allocated(device), time.perf_counter()
        model = whole(on, **{f"load_in_{bits}bit": True})()
        loaded, used = time.perf_counter() - started, torch.cuda.memory_allocated(device) - before
        direction = compute_direction(model, fit, DirectionSettings(), fingerprint=state["source"].fingerprint)
        cosine = float((direction.vectors @ state["device"]["direction"].T).abs())
        return (
            f"load {loaded:.1f} s, in all {time.perf_counter() - started:.1f} s, {used / 2**30:.2f} GiB on the device; "
            f"cosine with bf16 {cosine:.4f}"
        )

    if importlib.util.find_spec("bitsandbytes") is not None:
        check("large: 8 bits", lambda: in_bits(8))
        check("large: 4 bits", lambda: in_bits(4))
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

"""What a model needs: memory whole and streamed, disk, and time, from the headers of its weights alone.

Times extend measured constants: ``docs/scaling.md`` has the arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.architectures.read_matrix import experts_a_token
from ollama_forge.architectures.twin.skeleton import build_skeleton
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.method import ANSWER_TOKENS, FitSize
from ollama_forge.edits.registry import METHODS, method
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.device import memory_available, pick_device, pick_dtype
from ollama_forge.models.loading import memory_needed
from ollama_forge.models.stages import SMALL
from ollama_forge.prompts.conversation import Prompt, messages_of
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.sources.resolve import look_up

READ_SPEED = 1.0e9  # bytes a second, of an ordinary NVMe disk, with the page cache cold
TEMPLATE_TOKENS, CHARACTERS_A_TOKEN = 25, 4
PROCESS = 1 << 30  # bytes that Python, its libraries and the activations of a batch take
_PRODUCT = 1024  # rows and columns of the matrices whose product is timed


@dataclass(frozen=True)
class Work:
    """What a command does with a model.

    Attributes:
        command: the command.
        passes: number of passes over the weights of a streamed model.
        tokens: number of tokens that run through the model.
        seconds: time with the chosen way.
    """

    command: str
    passes: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Requirements:
    """What a model needs; sizes in bytes.

    Attributes:
        stored: size of the weights on disk.
        active: parameters that a token runs through.
        layer: the largest decoder layer in memory.
        whole: memory of the whole model.
        streamed: least memory of a streamed model, which holds two layers.
        fitting: what a method that fits takes on top of that.
        states: hidden states of all prompts of the largest pass, which are spilled beyond the memory.
        memory: what may be used.
        streams: whether the model is streamed with that memory; None if that is too little, too.
        flops: operations a second of a matrix product, measured here.
    """

    model: str
    parameters: int
    active: int
    stored: int
    dtype: str
    n_layers: int
    layer: int
    whole: int
    streamed: int
    fitting: int
    states: int
    memory: int
    streams: bool | None
    flops: float
    works: tuple[Work, ...]


def requirements(
    model: str, load: LoadSettings, *, revision: str | None = None, read_speed: float = READ_SPEED
) -> Requirements:
    """Find out what a model needs. Of a model on the Hub, only the config and the headers are read.

    Args:
        read_speed: bytes a second that the disk of the weights gives.

    Raises:
        ForgeError: the model does not exist, or its architecture cannot be mapped.
    """
    load.check()
    trust = load.trust_remote_code
    checkpoint = look_up(model, revision, trust_remote_code=trust)
    model_map = map_checkpoint(checkpoint, trust_remote_code=trust)
    device = pick_device(load.device)
    dtype = pick_dtype(load.dtype, device)
    layers, others = _stage_sizes(checkpoint, model_map, dtype, trust_remote_code=trust)
    largest = max([*layers, *(size for size in others if size >= SMALL)])
    streamed = 2 * largest + sum(size for size in others if size < SMALL) + PROCESS
    whole = memory_needed(checkpoint, model_map, dtype) + PROCESS
    memory = load.memory if isinstance(load.memory, int) else memory_available(device)
    streams = None if streamed > memory else whole > memory
    stored = sum(info.size for info in checkpoint.tensors.values())
    active, flops = _active(checkpoint, model_map), _flops(dtype, device)
    reading = stored / read_speed
    plans = list(_plans())
    works = [
        Work(command, passes, tokens, _seconds(passes, 2 * active * tokens / flops, reading, streams=bool(streams)))
        for command, passes, tokens, _ in plans
    ]
    works.append(Work("apply", 1, 0, 2 * reading))
    fitting = max(size.held + size.working for size in _fit_sizes(checkpoint, model_map))
    most = max(largest_pass for *_, largest_pass in plans)
    return Requirements(
        model=checkpoint.label,
        parameters=checkpoint.parameters,
        active=active,
        stored=stored,
        dtype=str(dtype).removeprefix("torch."),
        n_layers=model_map.n_layers,
        layer=max(layers),
        whole=whole,
        streamed=streamed,
        fitting=fitting,
        states=most * model_map.d_model * dtype.itemsize,
        memory=memory,
        streams=streams,
        flops=flops,
        works=tuple(works),
    )


def _seconds(passes: int, computing: float, reading: float, *, streams: bool) -> float:
    """Computing and reading go on at the same time; the passes of one token each compute next to nothing."""
    if not streams:
        return reading + computing
    full = min(passes, 3)
    return full * max(reading, computing / full) + (passes - full) * reading


def _plans() -> Iterator[tuple[str, int, int, int]]:
    """Each command with its passes over the weights, its tokens, and those of its largest pass."""
    for name, entry in METHODS.items():
        fit = PromptSettings().load(entry.pairs).fit
        pairs = _tokens([*fit.harmful, *fit.harmless])
        command = "compute-dir" if name == "orthogonal" else f"compute-dir --factors {name}"
        if not method(name).fits:
            yield command, 1, pairs, pairs
            continue
        passes = 3 + ANSWER_TOKENS  # the direction, the beginning that prompts share, each token, the inputs
        harmless: list[Prompt] = [*fit.harmless, *fit.general]
        answered = _tokens(harmless) + ANSWER_TOKENS * len(harmless)
        inputs = _tokens(fit.harmful) + answered
        yield command, passes, pairs + answered + inputs, max(pairs, inputs)


def _fit_sizes(checkpoint: Checkpoint, model_map: ModelMap) -> Iterator[FitSize]:
    """What each method takes to fit its factors."""
    for name, entry in METHODS.items():
        prompts = PromptSettings().load(entry.pairs).fit
        yield method(name).fit_size(model_map, checkpoint.config, entry.settings, prompts)


def _tokens(prompts: Sequence[Prompt]) -> int:
    """About how many tokens the prompts have."""
    characters = (sum(len(message["content"]) for message in messages_of(prompt)) for prompt in prompts)
    return sum(TEMPLATE_TOKENS + length // CHARACTERS_A_TOKEN for length in characters)


def _stage_sizes(
    checkpoint: Checkpoint, model_map: ModelMap, dtype: torch.dtype, *, trust_remote_code: bool
) -> tuple[list[int], list[int]]:
    """Bytes of each decoder layer, and of each module outside the layers that text runs through."""
    skeleton = build_skeleton(
        checkpoint.config, checkpoint.folder, trust_remote_code=trust_remote_code, text_alone=model_map.text_alone
    )
    layers = dict.fromkeys(model_map.layers, 0)
    used = {place.module for matrix in model_map.matrices for place in matrix.places}
    others = []
    for path, module in skeleton.named_modules():
        size = sum(parameter.numel() * dtype.itemsize for parameter in module.parameters(recurse=False))
        layer = next((one for one in layers if path == one or path.startswith(f"{one}.")), None)
        if layer is not None:
            layers[layer] += size
        elif path in used:
            others.append(size)
    return list(layers.values()), others


def _active(checkpoint: Checkpoint, model_map: ModelMap) -> int:
    """The number of parameters that a token runs through."""
    chosen = experts_a_token(checkpoint.config)
    experts = [matrix for matrix in model_map.matrices if matrix.is_expert]
    if chosen is None or not experts:
        return checkpoint.parameters
    stored = sum(math.prod(matrix.shape) for matrix in experts)
    layer = experts[0].layer
    numbers = {matrix.expert for matrix in experts if matrix.layer == layer and matrix.expert is not None}
    count = len(numbers) or experts[0].shape[0]
    return checkpoint.parameters - stored + stored * chosen // count


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product."""
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * _PRODUCT**3 / best

"""Round a loaded model's matrices to 8 bits and back, to see what rounding alone does to a measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ollama_forge.models.cpu_packing import unpacked
from ollama_forge.models.device import memory_available
from ollama_forge.models.stages import is_loaded

BLOCK = 32  # values that share a scale, as in the type Q8_0 of GGUF files
_LEVELS = 127
_ROOM = 1.3  # free memory required, as a multiple of the size of the copies


@contextmanager
def rounded(module: nn.Module) -> Iterator[bool]:
    """Inside the block all matrices of the module are rounded to 8 bits; afterwards they are as before.

    Yields False, and rounds nothing, if the memory does not suffice for a copy of the matrices, or if the model is
    streamed from disk.
    """
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1 and parameter.is_floating_point()]
    if not all(map(is_loaded, matrices)):
        yield False
        return
    sizes = Counter[torch.device]()
    for parameter in matrices:
        sizes[parameter.device] += parameter.nbytes
    if any(memory_available(device) < _ROOM * size for device, size in sizes.items()):
        yield False
        return
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(unpacked(part))
        for parameter in matrices:
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = round_to_8_bits(parameter.data)
        yield True


@torch.no_grad()
def round_to_8_bits(values: Tensor) -> Tensor:
    """Round ``[..., n]`` to multiples of a scale for each block of 32 (or each row, if 32 does not divide n)."""
    size = BLOCK if values.shape[-1] % BLOCK == 0 else values.shape[-1]
    blocks = values.float().reshape(*values.shape[:-1], -1, size)
    scale = (blocks.abs().amax(-1, keepdim=True) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return ((blocks / scale).round() * scale).view(values.shape).to(values.dtype)

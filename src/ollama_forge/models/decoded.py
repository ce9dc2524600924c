"""Give transformers the decoded tensors of a packed checkpoint, each one decoded when it is loaded.

transformers itself decodes some forms on some devices only, refuses FP8 matrices whose last block is not whole, and
takes many times longer for a GGUF file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix, as_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors

_BLOCK = 1 << 20  # values that are decoded at a time: few enough for the processor's cache
_STEP = 256  # blocks start at multiples of it, so that no form's group of values is decoded twice


class DecodedTensor:
    """A tensor of a checkpoint that is decoded straight to its device and type in memory.

    transformers indexes a tensor with ``...``, as it does the slices of safetensors, and then calls ``to``.
    """

    def __init__(self, tensors: CheckpointTensors, name: str) -> None:
        self.tensors, self.name = tensors, name

    def __getitem__(self, index: Any) -> DecodedTensor:
        assert index is ...
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values, each one rounded once."""
        packed = self.tensors.packed.get(self.name)
        if packed is None:
            info = self.tensors[self.name]
            return as_tensor(self.tensors.read_bytes(self.name), info.dtype, info.shape).to(device=device, dtype=dtype)
        values = torch.empty(packed.shape, dtype=dtype or torch.float32, device=device)
        for expert, matrix in enumerate(values) if packed.is_stack else [(None, values)]:
            decode_into(matrix, self.tensors.read_packed(self.name, expert))
        return values


def decode_into(values: Tensor, matrix: PackedMatrix) -> None:
    """Decode a matrix to ``values``, which may be of any float type and on any device."""
    if not matrix.codec.by_regions:
        values.copy_(matrix.decode())
        return
    rows, columns = matrix.shape
    step = max(1, _BLOCK // columns // _STEP) * _STEP
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values[part].copy_(matrix.decode(part))


def decoded_tensors(tensors: CheckpointTensors, *, empty: bool = False) -> dict[str, Any]:
    """All tensors of the model by name, to pass to ``from_pretrained`` as its ``state_dict``.

    Args:
        empty: on the meta device, without their values.
    """
    if empty:
        return {name: _EmptyTensor(shape) for name, shape in tensors.shapes.items()}
    return {name: DecodedTensor(tensors, name) for name in tensors.shapes}


class _EmptyTensor:
    """Stands for a ``DecodedTensor`` whose values are not read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> _EmptyTensor:
        assert index is ...
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or torch.float32, device="meta")

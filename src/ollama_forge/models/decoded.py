"""Give transformers the decoded tensors of a packed checkpoint, each one decoded when it is loaded.

transformers itself decodes some forms on some devices only, and refuses FP8 matrices whose last block is not whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import as_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors


class DecodedTensor:
    """A tensor of a checkpoint that is read where transformers indexes it, as it does the slices of safetensors."""

    def __init__(self, tensors: CheckpointTensors, name: str) -> None:
        self.tensors, self.name = tensors, name

    def __getitem__(self, index: Any) -> Tensor:
        packed = self.tensors.packed.get(self.name)
        if packed is None:
            info = self.tensors[self.name]
            return as_tensor(self.tensors.read_bytes(self.name), info.dtype, info.shape)[index]
        if not packed.is_stack:
            return self.tensors.read_packed(self.name).decode()[index]
        stack = torch.empty(packed.shape)
        for expert, matrix in enumerate(stack):
            matrix.copy_(self.tensors.read_packed(self.name, expert).decode())
        return stack[index]


def decoded_tensors(tensors: CheckpointTensors) -> dict[str, Any]:
    """All tensors of the model by name, to pass to ``from_pretrained`` as its ``state_dict``."""
    return {name: DecodedTensor(tensors, name) for name in tensors.shapes}

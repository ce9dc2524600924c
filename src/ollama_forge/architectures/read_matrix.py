"""Read one matrix of a checkpoint in any layout and storage type as float32 ``[out, in]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.checkpoints.storage import decode_tensor, tensor_bytes
from ollama_forge.checkpoints.tensors import CheckpointTensors

_EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def experts_a_token(config: Mapping[str, Any]) -> int | None:
    """The number of experts of a layer that a token is routed to, if the config tells."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return next((int(text[name]) for name in _EXPERTS_A_TOKEN if isinstance(text.get(name), int)), None)


def experts_of(matrix: Matrix) -> list[int | None]:
    """The indices of a stack's experts; ``[None]`` for a single matrix."""
    return list(range(matrix.shape[0])) if matrix.experts else [None]


def read_matrix(tensors: CheckpointTensors, matrix: Matrix, expert: int | None = None) -> tuple[Tensor, bytearray]:
    """Read a matrix, or one expert's matrix of a stack.

    Returns:
        float32 ``[out, in]``, ``[1, d]`` for a vector of the stream; and the stored bytes. For an F32 tensor the two
        share memory. Codes of a packed tensor that stand for no number become NaN.
    """
    if matrix.tensor in tensors.packed:
        packed = tensors.read_packed(matrix.tensor, expert)
        values, data = packed.decode(), bytearray().join(tensor_bytes(part) for part in packed.parts)
    else:
        info, data = tensors[matrix.tensor], _slice(tensors, matrix.tensor, expert)
        values = decode_tensor(data, info.dtype, info.shape if expert is None else info.shape[1:])
    return (values.T if matrix.transposed else values.reshape(-1, values.shape[-1])), data


def _slice(tensors: CheckpointTensors, name: str, expert: int | None) -> bytearray:
    if expert is None:
        return tensors.read_bytes(name)
    info = tensors[name]
    size = info.size // info.shape[0]
    return tensors.read_bytes(name, expert * size, size)

"""Read one matrix of a checkpoint in any layout and storage type as float32 ``[out, in]``."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.checkpoints.storage import decode_mxfp4, decode_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors


def experts_of(matrix: Matrix) -> list[int | None]:
    """The indices of a stack's experts; ``[None]`` for a single matrix."""
    return list(range(matrix.shape[0])) if matrix.experts else [None]


def read_matrix(tensors: CheckpointTensors, matrix: Matrix, expert: int | None = None) -> tuple[Tensor, bytearray]:
    """Read a matrix, or one expert's matrix of a stack.

    Returns:
        float32 ``[out, in]``, and the stored bytes. For an F32 tensor the two share memory.
    """
    if matrix.tensor in tensors:
        data = _slice(tensors, matrix.tensor, expert)
        info = tensors[matrix.tensor]
        values = decode_tensor(data, info.dtype, info.shape if expert is None else info.shape[1:])
        return (values.T if matrix.transposed else values), data
    blocks, scales = (_slice(tensors, f"{matrix.tensor}{part}", expert) for part in ("_blocks", "_scales"))
    shape = tensors[f"{matrix.tensor}_blocks"].shape[1:]
    values = decode_mxfp4(
        torch.frombuffer(blocks, dtype=torch.uint8).reshape(shape),
        torch.frombuffer(scales, dtype=torch.uint8).reshape(shape[:-1]),
    )
    return values, blocks + scales


def _slice(tensors: CheckpointTensors, name: str, expert: int | None) -> bytearray:
    if expert is None:
        return tensors.read_bytes(name)
    info = tensors[name]
    size = info.size // info.shape[0]
    return tensors.read_bytes(name, expert * size, size)

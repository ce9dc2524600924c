"""Reading one matrix of a checkpoint, whatever its layout and storage, as float32 ``[out, in]``."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.checkpoints.storage import decode_mxfp4, decode_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors


def experts_of(matrix: Matrix) -> list[int | None]:
    """The experts of a stack; ``[None]`` for a plain matrix."""
    return list(range(matrix.shape[0])) if matrix.experts else [None]


def read_matrix(tensors: CheckpointTensors, matrix: Matrix, expert: int | None = None) -> tuple[Tensor, bytearray]:
    """One matrix as float32 ``[out, in]`` (of ``expert``, for a stack), and the bytes it was read from."""
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

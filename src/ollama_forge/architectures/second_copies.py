"""Tied matrices that a checkpoint stores twice: an unembedding on disk that is the embedding, byte for byte."""

from __future__ import annotations

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.checkpoints.tensors import CheckpointTensors

_PIECE = 8 << 20


def second_copies(tensors: CheckpointTensors, model: ModelMap) -> dict[str, str]:
    """Name of a stored unembedding that is the embedding, byte for byte -> name of the embedding.

    An unembedding with other values is a matrix of its own, whatever the config says: so it is loaded, too.
    """
    embedding = next(matrix.tensor for matrix in model.matrices if matrix.role is Role.EMBEDDING)
    heads = [matrix.tensor for matrix in model.matrices if matrix.role is Role.UNEMBEDDING]
    return {head: embedding for head in heads if _same_bytes(tensors, embedding, head)}


def _same_bytes(tensors: CheckpointTensors, first: str, second: str) -> bool:
    one, other = tensors[first], tensors[second]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        tensors.read_bytes(first, start, min(_PIECE, one.size - start))
        == tensors.read_bytes(second, start, min(_PIECE, one.size - start))
        for start in range(0, one.size, _PIECE)
    )

"""Find a tied unembedding that a checkpoint stores although it equals the embedding."""

from __future__ import annotations

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.checkpoints.tensors import CheckpointTensors

_PIECE = 8 << 20


def second_copies(tensors: CheckpointTensors, model: ModelMap) -> dict[str, str]:
    """Map the name of every stored unembedding whose bytes equal the embedding's to the embedding's name.

    An unembedding with other bytes is a separate matrix even if the config ties it, because transformers loads it so.
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

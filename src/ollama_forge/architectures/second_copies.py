"""Find a tied unembedding that a checkpoint stores although it equals the embedding."""

from __future__ import annotations

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.checkpoints.tensors import CheckpointTensors


def second_copies(tensors: CheckpointTensors, model: ModelMap) -> dict[str, str]:
    """Map the name of every stored unembedding whose bytes equal an embedding's to the embedding's name.

    An unembedding with other bytes is a separate matrix even if the config ties it, because transformers loads it so.
    """
    plain = [matrix for matrix in model.matrices if matrix.tensor not in tensors.packed]
    embeddings = [matrix.tensor for matrix in plain if matrix.role is Role.EMBEDDING]
    heads = [matrix.tensor for matrix in plain if matrix.role is Role.UNEMBEDDING]
    return {head: table for table in embeddings for head in heads if tensors.same_bytes(table, head)}

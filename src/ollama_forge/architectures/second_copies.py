"""Find a tied unembedding that a checkpoint stores although it equals the embedding."""

from __future__ import annotations

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.checkpoints.tensors import CheckpointTensors


def second_copies(tensors: CheckpointTensors, model: ModelMap) -> dict[str, str]:
    """Map the name of every stored unembedding whose bytes equal the embedding's to the embedding's name.

    An unembedding with other bytes is a separate matrix even if the config ties it, because transformers loads it so.
    """
    embedding = next((matrix.tensor for matrix in model.matrices if matrix.role is Role.EMBEDDING), None)
    heads = [matrix.tensor for matrix in model.matrices if matrix.role is Role.UNEMBEDDING]
    if embedding is None or embedding in tensors.packed:
        return {}
    return {head: embedding for head in heads if head not in tensors.packed and tensors.same_bytes(embedding, head)}

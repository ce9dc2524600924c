"""Learn how a model is built from experiments on its twin, and map the checkpoint's tensors to roles.

The result for a config is cached (``cache.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.learned import LearnedArchitecture, RoleFound
from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.architectures.names.bind import bind_checkpoint
from ollama_forge.architectures.names.locate import locate
from ollama_forge.architectures.parts.assign import assign_roles
from ollama_forge.architectures.roles.find import find_roles
from ollama_forge.architectures.twin.build import Twin, build_twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.progress import status


def map_checkpoint(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> ModelMap:
    """Map a checkpoint's tensors to roles and layers, as its class uses them.

    Raises:
        ForgeError: transformers does not know the class, no twin of it runs, a tensor is missing or has another shape
            than the others imply, or a tensor is unknown to the class.
    """
    learned = learn(checkpoint.config, checkpoint.folder, trust_remote_code=trust_remote_code)
    return bind_checkpoint(learned, checkpoint, trust_remote_code=trust_remote_code)


def learn(
    config: Mapping[str, Any], folder: Path | None = None, *, trust_remote_code: bool = False
) -> LearnedArchitecture:
    """Learn the architecture of a config.json, or take it from the cache.

    Args:
        folder: the checkpoint's folder, for a model with Python code of its own.
        trust_remote_code: whether that code may be executed.

    Raises:
        ForgeError: transformers does not know the class, or no twin of it runs.
    """

    def find() -> LearnedArchitecture:
        with status(f"learning how a {config.get('model_type')} model is built"):
            return learn_from(build_twin(config, folder=folder, trust_remote_code=trust_remote_code))

    return cached(LearnedArchitecture, ".json", config, folder, find)


def learn_from(twin: Twin) -> LearnedArchitecture:
    """Run all experiments on a twin."""
    found = find_roles(twin)
    head, tied = _head(twin.model)
    roles = assign_roles(twin, found.roles, found.blocks)
    if head is not None and not tied:
        module = head.rpartition(".")[0]
        roles += (RoleFound(head, module, writes=False, axis=1, linear=True, role=Role.UNEMBEDDING),)
    return LearnedArchitecture(found.d_model, found.blocks, roles, locate(twin), found.gaps, twin.text_alone)


def _head(model: nn.Module) -> tuple[str | None, bool]:
    """The name of the unembedding's parameter, None without one; and whether it is the embedding."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    embedding = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return names.get(id(weight)), weight is not None and weight is embedding

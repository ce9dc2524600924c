"""Certify an architecture with the edit that real checkpoints get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.certificate.certificate import Certificate, EditKind
from ollama_forge.architectures.certificate.certify import Load, certify
from ollama_forge.architectures.learn import learn
from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.architectures.names.bind import bind_checkpoint
from ollama_forge.architectures.twin.build import Twin, build_twin, save_twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.orthogonal import orthogonal_edit
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.progress import status
from ollama_forge.quiet import quiet_transformers


def certify_architecture(
    config: Mapping[str, Any], folder: Path | None = None, *, trust_remote_code: bool = False
) -> Certificate:
    """Certify the architecture of a config.json, or take the certificate from the cache.

    Args:
        folder: the checkpoint's folder, for a model with Python code of its own.
        trust_remote_code: whether that code may be executed.

    Raises:
        ForgeError: transformers does not know the class, no twin of it runs, or its edited twin cannot be loaded.
    """

    def find() -> Certificate:
        learned = learn(config, folder, trust_remote_code=trust_remote_code)
        with status(f"proving edits of a {config.get('model_type')} model"), TemporaryDirectory() as saved:
            twin = build_twin(config, folder=folder, trust_remote_code=trust_remote_code)
            save_twin(twin, Path(saved))
            checkpoint = Checkpoint(Path(saved), "the twin", "folder")
            model_map = bind_checkpoint(learned, checkpoint, trust_remote_code=trust_remote_code)
            return certify_twin(twin, checkpoint, model_map)

    return cached(Certificate, ".certificate.json", config, folder, find)


def certify_twin(twin: Twin, checkpoint: Checkpoint, model_map: ModelMap) -> Certificate:
    """Certify a twin.

    Args:
        checkpoint: the twin as ``save_pretrained`` wrote it, with its ``model_map``.

    Raises:
        ForgeError: the edit fails, or the edited checkpoint cannot be loaded.
    """
    return certify(twin, checkpoint, model_map, full_edit, loader(twin))


def full_edit(
    checkpoint: Checkpoint,
    model_map: ModelMap,
    directions: Tensor,
    kind: EditKind,
    folder: Path,
    strength: float = 1.0,
) -> None:
    """Remove directions from all matrices of one kind, keeping the matrices' norms, and write the checkpoint.

    Args:
        directions: a unit vector ``[n_layers, d_model]`` for each layer; embeddings take the first one.

    Raises:
        ForgeError: a norm maps a direction to zero, or the checkpoint is damaged.
    """
    direction = RefusalDirection(directions, per_layer=True)
    read = vector_reader(checkpoint.tensors)
    edits = {
        matrix.tensor: orthogonal_edit(matrix, direction.for_layer(matrix.layer or 0), strength, True, read)
        for matrix in model_map.matrices
        if matrix.writes is (kind is EditKind.WRITERS) and matrix.role is not Role.UNEMBEDDING
    }
    plan = EditPlan("orthogonal", edits, {}, projects=True)
    write_checkpoint(checkpoint, model_map, plan, folder, settings=None, out_dtype="keep", direction=direction)


def loader(twin: Twin) -> Load:
    """Loads a checkpoint in float32 with the class of the twin."""

    def load(folder: Path) -> nn.Module:
        with quiet_transformers():
            try:
                model: nn.Module = type(twin.model).from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
            except Exception as error:  # invalid weights make transformers raise any exception
                raise ForgeError(f"the edited twin cannot be loaded: {error_line(error)}", "report it") from error
        return model.eval()

    return load

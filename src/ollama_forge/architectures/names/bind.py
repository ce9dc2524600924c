"""From what was learned about a model's class to the ``ModelMap`` of a checkpoint.

The checkpoint has its own number of layers and experts, its own sizes, and maybe an older spelling of the names. The
model of its config, without weights, tells which parameters there are, and their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ollama_forge.architectures.learned import LearnedArchitecture
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.names.accounts import check_complete, check_known
from ollama_forge.architectures.names.layout import Layout
from ollama_forge.architectures.names.matrices import MatrixBuilder
from ollama_forge.architectures.names.pieces import Shape
from ollama_forge.architectures.second_copies import second_copies
from ollama_forge.architectures.twin.skeleton import build_skeleton
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError


def bind_checkpoint(
    learned: LearnedArchitecture, checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> ModelMap:
    """Map a checkpoint's tensors to roles and layers, and find a tied head that it stores all the same.

    Args:
        trust_remote_code: whether the checkpoint's own Python code may be executed.

    Raises:
        ForgeError: as ``bind``; or the checkpoint's index names tensors that no shard holds.
    """
    skeleton = build_skeleton(checkpoint.config, checkpoint.folder, trust_remote_code=trust_remote_code)
    layout = Layout(learned, skeleton, checkpoint.tensors.shapes)
    model_map = _model_map(learned, layout, str(checkpoint.config.get("model_type", "")))
    absent = layout.spelling.read(checkpoint.tensors.absent)
    lost = sorted(name for name, spelled in absent.items() if layout.head not in spelled.targets)
    if lost:
        raise ForgeError(
            f"{checkpoint.label} lacks {len(lost)} tensors that its index names, such as {lost[0]}",
            "download or save it again",
        )
    copies = second_copies(checkpoint.tensors, model_map)
    return replace(model_map, copies=copies) if copies and layout.head not in layout.parameters else model_map


def bind(learned: LearnedArchitecture, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelMap:
    """Map tensors to roles and layers.

    Args:
        learned: what was learned about the class, from a twin of this config.
        config: the content of config.json.
        shapes: the shape of each tensor of the checkpoint, packed ones after decoding.

    Raises:
        ForgeError: a tensor is missing or unknown, or has a shape that contradicts the config.
    """
    layout = Layout(learned, build_skeleton(config), shapes)
    return _model_map(learned, layout, str(config.get("model_type", "")))


def _model_map(learned: LearnedArchitecture, layout: Layout, model_type: str) -> ModelMap:
    check_complete(layout, model_type)
    check_known(layout, model_type)
    builder = MatrixBuilder(learned, layout)
    matrices = builder.matrices()
    return ModelMap(
        model_type=model_type,
        d_model=builder.d_model,
        matrices=tuple(sorted(matrices, key=_place_in_model)),
        layers=layout.counterparts.blocks,
        vocabulary=layout.model.get_input_embeddings().weight.shape[0],
        tied=not any(matrix.role is Role.UNEMBEDDING for matrix in matrices),
        unused=frozenset(layout.tensors) - _used(matrices),
        gaps=tuple(builder.gaps),
        alike=tuple(layout.counterparts.alike(block) for block in layout.counterparts.blocks),
    )


def _place_in_model(matrix: Matrix) -> tuple[int, int]:
    """Embeddings first, the head last."""
    if matrix.layer is not None:
        return 1, matrix.layer
    return (0, 0) if matrix.writes else (2, 0)


def _used(matrices: list[Matrix]) -> set[str]:
    """The tensors of all matrices, their biases and their norms."""
    used: set[str | None] = set()
    for matrix in matrices:
        norms = [*matrix.post_norms, *([] if matrix.reads is None else [matrix.reads])]
        used |= {matrix.tensor, matrix.bias, *(norm.weight for norm in norms), *(norm.bias for norm in norms)}
    return {name for name in used if name is not None}

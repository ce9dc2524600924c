"""From what was learned about a model's class to the ``ModelMap`` of a checkpoint.

The checkpoint has its own number of layers and experts, its own sizes, and maybe an older spelling of the names. The
model of its config, without weights, tells which parameters there are, and their shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ollama_forge.architectures.learned import LearnedArchitecture
from ollama_forge.architectures.model_class import has_text_class
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.names.accounts import check_complete, check_known
from ollama_forge.architectures.names.boxes import Box
from ollama_forge.architectures.names.layout import Layout
from ollama_forge.architectures.names.matrices import MatrixBuilder
from ollama_forge.architectures.names.pieces import Shape
from ollama_forge.architectures.names.spelling import Spelling
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
    config, shapes = checkpoint.config, checkpoint.tensors.shapes
    layout, model_map = _bound(learned, config, shapes, checkpoint.folder, trust_remote_code)
    absent = layout.spelling.read(checkpoint.tensors.absent)
    lost = sorted(name for name, spelled in absent.items() if layout.head not in spelled.targets)
    if lost:
        raise ForgeError(
            f"{checkpoint.label} lacks {len(lost)} tensors that its index names, such as {lost[0]}",
            "download or save it again",
        )
    copies = second_copies(checkpoint.tensors, model_map)
    return replace(model_map, copies=copies) if copies and layout.head not in layout.parameters else model_map


def locate_parameters(
    learned: LearnedArchitecture, checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> dict[str, list[Box]]:
    """Where the tensors of a checkpoint hold each parameter and persistent buffer, tied ones by each of their names.

    Parameters that are stored in an order that no few boxes express are left out.

    Raises:
        ForgeError: as ``bind``.
    """
    config, shapes = checkpoint.config, checkpoint.tensors.shapes
    layout, _ = _bound(learned, config, shapes, checkpoint.folder, trust_remote_code)
    found = dict(layout.boxes)
    for name, boxes in layout.boxes.items():
        found |= dict.fromkeys(layout.aliases.get(name, ()), boxes)
    return found


def bind(learned: LearnedArchitecture, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelMap:
    """Map tensors to roles and layers.

    Args:
        learned: what was learned about the class, from a twin of this config.
        config: the content of config.json.
        shapes: the shape of each tensor of the checkpoint, packed ones after decoding.

    Raises:
        ForgeError: a tensor is missing or unknown, or has a shape that contradicts the config.
    """
    return _bound(learned, config, shapes, None, trust_remote_code=False)[1]


def _bound(
    learned: LearnedArchitecture,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    folder: Path | None,
    trust_remote_code: bool,
) -> tuple[Layout, ModelMap]:
    text_alone = learned.text_alone
    skeleton = build_skeleton(config, folder, trust_remote_code=trust_remote_code, text_alone=text_alone)
    towers = _towers(config, skeleton, shapes) if text_alone else frozenset()
    layout = Layout(learned, skeleton, {name: shape for name, shape in shapes.items() if name not in towers})
    model_map = _model_map(learned, layout, str(config.get("model_type", "")))
    return layout, replace(model_map, unused=model_map.unused | towers, text_alone=text_alone)


def _towers(config: Mapping[str, Any], text: Any, names: Iterable[str]) -> frozenset[str]:
    """The tensors of the wrapper that a config names which its type's causal LM, ``text``, does not know."""
    if not has_text_class(config):
        return frozenset()
    known = [_known(Spelling(model), names) for model in (build_skeleton(config), text)]
    return frozenset(known[0] - known[1])


def _known(spelling: Spelling, names: Iterable[str]) -> set[str]:
    """The tensors that fill something of a model."""
    return {
        name
        for name, spelled in spelling.read(names).items()
        if any(target in spelling.names for target in spelled.targets)
    }


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

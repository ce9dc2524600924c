"""Check that the places of a model map are where the loaded model has each matrix."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from ollama_forge.architectures.model_map import Matrix, ModelMap, Place, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint


def stored_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.tensors.shards:
        tensors |= load_file(shard)
    return tensors


def assert_places(model: torch.nn.Module, checkpoint: Checkpoint, model_map: ModelMap) -> None:
    """Assert that every matrix, its bias and its norms have the same values in the loaded model and on disk.

    The places of a matrix must have each of its rows once.
    """
    tensors = stored_tensors(checkpoint)
    for matrix in model_map.matrices:
        stored = tensors[matrix.tensor]
        assert tuple(stored.shape) == matrix.shape, matrix.tensor
        rows: list[int] = []
        for place in matrix.places:
            values = _in_memory(model, place)
            assert torch.equal(values, _on_disk(matrix, place, stored)), (matrix.tensor, place)
            rows += list(place.stored_rows or range(_rows(matrix)))
            assert (place.bias is None) == (matrix.bias is None), matrix.tensor
            if place.bias is not None and matrix.bias is not None:
                _assert_bias(model, place, matrix, tensors[matrix.bias])
        assert sorted(rows) == list(range(_rows(matrix))), matrix.tensor
        for norm in [*matrix.post_norms, *([] if matrix.reads is None else [matrix.reads])]:
            module = model.get_submodule(norm.module)
            if norm.weight is not None:
                assert torch.equal(tensors[norm.weight], module.get_parameter(norm.parameter)), norm
            if norm.bias is not None:
                assert any(torch.equal(tensors[norm.bias], bias) for bias in module.parameters()), norm


def _rows(matrix: Matrix) -> int:
    return matrix.out_features if matrix.role not in (Role.EMBEDDING, Role.POSITION) else matrix.shape[0]


def _in_memory(model: torch.nn.Module, place: Place) -> torch.Tensor:
    """The part of a parameter at a place, ``[..., out, in]``."""
    values = model.get_submodule(place.module).get_parameter(place.parameter)
    if place.expert is not None:
        values = values[place.expert]
    if place.transposed:
        values = values.transpose(-1, -2)
    return values if place.rows is None else values[..., list(place.rows), :]


def _on_disk(matrix: Matrix, place: Place, stored: torch.Tensor) -> torch.Tensor:
    values = stored.transpose(-1, -2) if matrix.transposed else stored
    return values if place.stored_rows is None else values[..., list(place.stored_rows), :]


def _assert_bias(model: torch.nn.Module, place: Place, matrix: Matrix, stored: torch.Tensor) -> None:
    assert place.bias is not None
    values = model.get_submodule(place.module).get_parameter(place.bias)
    if place.expert is not None:
        values = values[place.expert]
    values = values if place.rows is None else values[..., list(place.rows)]
    assert torch.equal(values, stored if place.stored_rows is None else stored[..., list(place.stored_rows)])

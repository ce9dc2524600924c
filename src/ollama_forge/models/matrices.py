"""The matrices of a checkpoint in a loaded model: views of the parameters that hold them, and their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_map import Matrix, Place
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel

ParameterValues = Callable[[nn.Parameter], Tensor]


def present_values(parameter: nn.Parameter) -> Tensor:
    """The values that a parameter has now."""
    return parameter.data


def weight_of(
    model: ChatModel, matrix: Matrix, expert: int | None = None, values: ParameterValues = present_values
) -> Tensor:
    """A matrix of a loaded model as float32 ``[out, in]``; a vector as ``[1, d]``.

    Args:
        expert: index of the expert if the matrix is a stack, else None.
        values: returns the values of a parameter, for a caller that has exchanged some.

    Raises:
        ForgeError: the model was loaded in 8 or 4 bits.
    """
    parts = []
    for place in matrix.places:
        model.require(place)
        parts.append((place, weight_at(values(parameter_of(model, place)), place, expert)))
    return _gathered(parts)


def bias_of(
    model: ChatModel, matrix: Matrix, expert: int | None = None, values: ParameterValues = present_values
) -> Tensor:
    """The bias of a matrix of a loaded model as float32 ``[out]``; see ``weight_of``."""
    parts = []
    for place in matrix.places:
        model.require(place)
        parts.append((place, bias_at(values(bias_parameter(model, place)), place, expert)))
    return _gathered(parts)


def _gathered(parts: list[tuple[Place, Tensor]]) -> Tensor:
    """Join the parts of a matrix or bias, each of which holds the rows ``stored_rows``."""
    place, first = parts[0]
    if not first.is_floating_point():
        raise ForgeError("a model loaded in 8 or 4 bits cannot be edited", "leave out --load-in-8bit or --load-in-4bit")
    if place.stored_rows is None:
        return first.float()
    out = first.new_empty((sum(len(part) for _, part in parts), *first.shape[1:]), dtype=torch.float32)
    for place, part in parts:
        out[as_slice(place.stored_rows)] = part.float()
    return out


def parameter_of(model: ChatModel, place: Place) -> nn.Parameter:
    """The parameter that holds a matrix or a part of it."""
    return model.submodule(place).get_parameter(place.parameter)


def bias_parameter(model: ChatModel, place: Place) -> nn.Parameter:
    """The parameter that holds the bias of a matrix; ``place.bias`` must not be None."""
    assert place.bias is not None
    return model.submodule(place).get_parameter(place.bias)


def weight_at(values: Tensor, place: Place, expert: int | None) -> Tensor:
    """The part of a parameter's values that a place names, as a view ``[rows, in]``; of a vector ``[1, d]``.

    Args:
        expert: index of the expert if the matrix is a stack, else None.
    """
    index = place.expert if expert is None else expert
    matrix = values if index is None else values[index]
    if matrix.ndim != 2:  # a vector, or the kernel of a convolution over one position
        matrix = matrix.view(1, -1) if matrix.ndim == 1 else matrix.squeeze()
    if place.transposed:
        matrix = matrix.T
    return matrix[as_slice(place.rows)]


def bias_at(values: Tensor, place: Place, expert: int | None) -> Tensor:
    """The part of a bias parameter's values that belongs to a place, as a view ``[rows]``; see ``weight_at``."""
    index = place.expert if expert is None else expert
    return (values if index is None else values[index])[as_slice(place.rows)]


def as_slice(rows: range | None) -> slice:
    """The slice of these rows; None stands for all rows."""
    return slice(None) if rows is None else slice(rows.start, rows.stop, rows.step)

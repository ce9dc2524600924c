"""Compare the written values of a matrix and its bias with the edit computed in float64.

A written value is the planned edit, computed in float32 and rounded once to the storage type. The float32 result is
within a bound ``a`` of the exact edit ``E``, and rounding moves a value by at most half the distance to its neighbour.
The written value is therefore at most ``a + ulp(|E| + a) / 2`` from ``E``. In a packed form (FP8, MXFP4) a value may be
rounded either up or down, to numbers whose distance follows from the written scale: it is at most ``a + ulp(|E| + a)``
from ``E``. There the sum of all values is compared too (``_AppliedShare``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.base import TORCH_TYPES, WHOLE, Codec, PackedMatrix, Region, WritableCodec
from ollama_forge.checkpoints.formats.rounding import Kept
from ollama_forge.checkpoints.storage import stored_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.blocks import kept_products
from ollama_forge.edits.factors import (
    EditedMatrix,
    Factors,
    FixedFactors,
    RemoveFromInput,
    RemoveFromOutput,
    Rescale,
    Rule,
    edit_matrix,
)
from ollama_forge.edits.plan import FixedBiasShift, MatrixEdit
from ollama_forge.evaluation.verify.checks import Worst

UNIT_ROUNDOFF = 2.0**-24  # of float32
_EXPONENT = 0x7FF << 52  # of a float64
_UNDERFLOW = torch.finfo(torch.float32).tiny
_BLOCK = 1 << 20  # values of a matrix that are compared at a time, in about ten float64 tensors
_ROWS, _COLUMNS = 0, 1
_DEVIATIONS = 8  # of the share of an edit that was applied
_SHARE_OF_CODEBOOKS = 0.4  # that a type with codebooks may change of an edit, and of the products that it leaves


@dataclass(frozen=True)
class Products:
    """Products ``[n, out]`` (float64) of a matrix with the inputs ``[n, in]`` of a probe; a writer's include its bias.

    Attributes:
        written: the products with the written matrix.
        planned: the products with the exact edit; ``written`` if the matrix or its bias is not the planned edit, so
            that ``written - planned`` holds the effect of rounding alone.
        before: the products with the source's matrix, rescaled like the edited one.
        norm, norm_before: Frobenius norms of the written matrix, and of the source's matrix rescaled like it.
    """

    written: Tensor
    planned: Tensor
    before: Tensor
    norm: float
    norm_before: float


@dataclass(frozen=True)
class _Reference:
    """The exact edit of some rows or columns, in float64.

    Attributes:
        weight: the exact edit ``E``.
        error: ``a``, the bound on the error of float32 arithmetic.
        scale: the scale of the norm rule, broadcastable to ``weight``; 1 without a norm rule.
        scale_error: the relative error of ``scale`` in float32.
        factors: the factors at strength 1.
        magnitudes: the factors computed from the absolute values of ``W`` and of the rule, without cancellation.
    """

    weight: Tensor
    error: Tensor
    scale: Tensor
    scale_error: Tensor
    factors: Factors
    magnitudes: Factors


def _reference(weight: Tensor, rule: Rule, edit: MatrixEdit, expert: int | None) -> _Reference:
    """The exact edit of float64 ``weight`` ``[out, in]``, and the error bound of the same edit in float32.

    A sum of n products has an error of at most ``n u sum |x||y|`` in any order of summation (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.5).
    """
    strength, contracted = abs(edit.strength), 0
    if isinstance(rule, RemoveFromOutput):
        contracted = weight.shape[0]
    elif isinstance(rule, RemoveFromInput):
        contracted = weight.shape[1]
    exact = edit_matrix(weight, _with_tensors(rule, Tensor.double), edit.strength, Rescale.NONE, expert)
    magnitudes = _with_tensors(rule, lambda t: t.double().abs()).factors(weight.abs(), expert)
    removed = strength * magnitudes.L @ magnitudes.K.T
    terms = magnitudes.L.shape[1] + 4  # products over the directions, the strength, the difference
    error = UNIT_ROUNDOFF * (terms * (weight.abs() + removed) + contracted * removed) + _UNDERFLOW
    one = torch.ones(1, 1, dtype=torch.float64)
    if edit.rescale is Rescale.NONE:
        return _Reference(exact.weight, error, one, torch.zeros_like(one), exact.factors, magnitudes)
    axis = 0 if edit.rescale is Rescale.COLUMNS else 1
    count = weight.shape[axis]
    before = torch.linalg.vector_norm(weight, dim=axis, keepdim=True)
    after = torch.linalg.vector_norm(exact.weight, dim=axis, keepdim=True)
    drift = torch.linalg.vector_norm(error, dim=axis, keepdim=True) + count * _UNDERFLOW**0.5
    scale = torch.where(after > 0, before / after.clamp_min(1e-300), 1.0)
    scale_error = (count + 6) * UNIT_ROUNDOFF + 2 * drift / after.clamp_min(1e-300)
    edited = exact.weight * scale
    error = scale * error * (1 + scale_error) + edited.abs() * scale_error
    # A row or column along the direction becomes float32 noise, which the norm rule may scale up to the old norm.
    error = torch.where(drift >= after / 2, 2 * before, error)
    return _Reference(edited, error, scale, scale_error, exact.factors, magnitudes)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A rule (of a matrix or a bias) with ``change`` applied to all its tensors."""
    tensors = {f.name: getattr(value, f.name) for f in fields(value) if isinstance(getattr(value, f.name), Tensor)}
    return replace(value, **{name: change(tensor) for name, tensor in tensors.items()})


def compare_edit(
    source: Checkpoint, written: Checkpoint, edit: MatrixEdit, expert: int | None, probe: Tensor, worst: Worst
) -> Products:
    """Compare one edited matrix (of one expert) and its bias with the plan.

    Args:
        probe: float64 inputs ``[n, in]`` to multiply the matrix with; n may be 0.
        worst: is updated with the largest error relative to its bound.

    Returns:
        The products of the matrix with the inputs.
    """
    matrix, matrix_worst = edit.matrix, Worst()
    products = torch.zeros(3, len(probe), matrix.out_features, dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    parts, applied = list[_Reference](), _AppliedShare(_projection(edit, expert))
    for before, after, rows, columns, spacing in _blocks(source.tensors, written.tensors, edit, expert):
        rule, index = _rule_for(edit.rule, expert, rows, columns)
        exact = _reference(before.double(), rule, edit, index)
        rounding = spacing(exact.weight, exact.error)
        place = _stored_index(matrix, expert, rows, columns)
        matrix_worst.update((after.double() - exact.weight).abs(), exact.error + rounding, place)
        applied.add(before.double(), exact.weight, after.double(), exact.error)
        rescaled = before.double() * exact.scale
        for number, values in enumerate((after.double(), exact.weight, rescaled)):
            products[number, :, rows] += probe[:, columns] @ values.T
        squares += torch.stack([after.double().square().sum(), rescaled.square().sum()])
        nothing = exact.weight.new_empty(0)
        parts.append(replace(exact, weight=nothing, error=nothing))
    if matrix.bias is not None and (edit.bias_edit is not None or adds_to_stream(matrix)):
        biases = _compare_bias(source, written, edit, expert, parts, matrix_worst)
        products += biases.unsqueeze(1) if adds_to_stream(matrix) else 0
    if (packed := written.tensors.packed.get(matrix.tensor)) is not None:
        place_of_share = f"the size of the edit of {matrix.tensor}{'' if expert is None else [expert]}"
        applied.judge(place_of_share, matrix_worst, packed.codec)
    planned = products[1] if matrix_worst.passed else products[0]
    worst.merge(matrix_worst)
    norm, norm_before = squares.sqrt().tolist()
    return Products(products[0], planned, products[2], norm, norm_before)


class _AppliedShare:
    """How much of the planned change along its direction a matrix got.

    In a packed form, each value's edit may be much smaller than its rounding, so that values alone do not tell an edit
    from none. All of them together do. With ``P`` the planned change ``E - W``, projected on the products that the edit
    is about (``kept_products``), and ``e = W' - E`` the rounding errors, the share ``1 + <e, P> / <P, P>`` is 1 as far
    as the errors are independent, to a standard deviation of ``sqrt(sum e^2 P^2) / <P, P>``. Types with few numbers
    also shrink all values by a share of ``|e|^2 / |E|^2``, and the products of ``E`` with them. Types with codebooks
    choose one code for several values, whose errors depend on each other.
    """

    _DEVIATIONS = 8  # values that share a code are not independent

    def __init__(self, kept: Kept | None) -> None:
        self.kept = kept
        self.along = self.planned = self.variance = self.rounded = self.size = self.overlap = self.arithmetic = 0.0

    def add(self, before: Tensor, exact: Tensor, after: Tensor, error: Tensor) -> None:
        """Add a block.

        Args:
            error: the bound on the error of float32 arithmetic.
        """
        change, rounding = self._projected(exact - before), after - exact
        products = rounding * change
        self.along += float(products.sum())
        self.variance += float(products.square().sum())
        self.planned += float(change.square().sum())
        self.rounded += float(rounding.square().sum())
        self.size += float(exact.square().sum())
        self.overlap += float((exact * change).sum())
        self.arithmetic += float((error * change.abs()).sum())

    def _projected(self, change: Tensor) -> Tensor:
        if self.kept is None:
            return change
        basis = self.kept.basis.double()
        return basis @ (basis.T @ change) if self.kept.axis == 0 else (change @ basis) @ basis.T

    def judge(self, place: str, worst: Worst, codec: Codec) -> None:
        """Update ``worst`` with the distance of the share from 1, and the bound on it."""
        if not self.planned:
            return
        assert isinstance(codec, WritableCodec)
        if codec.rounds_values:
            bound = _DEVIATIONS * self.variance**0.5 + 2 * abs(self.overlap) * self.rounded / (self.size or 1.0)
        else:
            bound = _SHARE_OF_CODEBOOKS * (self.planned + abs(self.overlap))
        values = torch.tensor([abs(self.along), bound + self.arithmetic], dtype=torch.float64) / self.planned
        worst.update(values[:1], values[1:], lambda _: place)


def _projection(edit: MatrixEdit, expert: int | None) -> Kept | None:
    """The products that an edit is about; None if its whole change is, as with given factors without a norm rule."""
    if isinstance(edit.rule, FixedFactors) and edit.rescale is Rescale.NONE:
        return None
    return kept_products(edit, expert)


def adds_to_stream(matrix: Matrix) -> bool:
    """Whether the output of a matrix is added to the stream.

    The rows of an embedding, and a vector that is added to the stream, are edited like those of a reader.
    """
    return matrix.writes and not matrix.rows_are_written


def _compare(written: Tensor, exact: Tensor, error: Tensor, worst: Worst, place: Callable[[int], str]) -> None:
    """Compare written values, in their storage type, with exact ones, given the error of float32."""
    bound = error + _half_spacing(exact.abs() + error, written.dtype)
    worst.update((written.double() - exact).abs(), bound, place)


def _half_spacing(magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest rounding error of a storage type at positive float64 values: half the spacing of its values."""
    info = torch.finfo(dtype)
    powers = (magnitudes.view(torch.int64) & _EXPONENT).view(torch.float64)  # the power of 2 at or below
    return powers.clamp_min(info.smallest_normal) * (info.eps / 2)


def _compare_bias(
    source: Checkpoint,
    written: Checkpoint,
    edit: MatrixEdit,
    expert: int | None,
    parts: list[_Reference],
    worst: Worst,
) -> Tensor:
    """Compare the bias of a matrix with the plan.

    Args:
        parts: the exact edits of all blocks of the matrix.

    Returns:
        The bias as written, as planned and before the edit: float64 ``[3, out]``.
    """
    name = edit.matrix.bias
    assert name is not None
    stored = _bias(written.tensors, name, expert)
    before, after = _bias(source.tensors, name, expert).double(), stored.double()
    if edit.bias_edit is None:
        return torch.stack([after, after, before])
    exact, magnitudes = (_joined(parts, edit, factors) for factors in ("factors", "magnitudes"))
    shift = _with_tensors(edit.bias_edit, Tensor.double).shift(before, exact, edit.strength, expert)
    moved = _with_tensors(edit.bias_edit, lambda t: t.double().abs()).shift(
        before.abs(), magnitudes, edit.strength, expert
    )
    terms = 8
    if not isinstance(
        edit.bias_edit, FixedBiasShift
    ):  # two sums over the stream: a factor, and its product with a bias
        terms += 2 * (len(before) if adds_to_stream(edit.matrix) else edit.matrix.in_features)
    error = UNIT_ROUNDOFF * (terms * moved.abs() + 4 * before.abs()) + _UNDERFLOW
    if edit.rescale is Rescale.ROWS:
        error += torch.cat([part.scale_error for part in parts]).flatten() * shift.abs()
    place = [] if expert is None else [expert]
    _compare(stored, before + shift, error, worst, lambda index: f"{name}{[*place, index]}")
    return torch.stack([after, before + shift, before])


def _joined(parts: list[_Reference], edit: MatrixEdit, factors: str) -> EditedMatrix:
    """The parts of a matrix's edit that its bias depends on: ``L``, and the scale of the rows."""
    blocks: list[Factors] = [getattr(part, factors) for part in parts]
    by_rows = _axis(edit) == _ROWS
    left = torch.cat([block.L for block in blocks]) if by_rows else blocks[0].L
    scale = torch.cat([part.scale for part in parts]).flatten() if edit.rescale is Rescale.ROWS else None
    return EditedMatrix(left.new_empty(0), Factors(left, blocks[0].K), scale)


def _bias(tensors: CheckpointTensors, name: str, expert: int | None) -> Tensor:
    info = tensors[name]
    size = info.size if expert is None else info.size // info.shape[0]
    return stored_tensor(tensors.read_bytes(name, (expert or 0) * size, size), info.dtype, info.shape[-1:])


def _axis(edit: MatrixEdit) -> int:
    """The axis of ``W`` ``[out, in]`` along which rows, or columns, are edited independently."""
    if isinstance(edit.rule, RemoveFromOutput) or (
        isinstance(edit.rule, FixedFactors) and edit.rescale is Rescale.COLUMNS
    ):
        return _COLUMNS
    return _ROWS


def _rule_for(rule: Rule, expert: int | None, rows: slice, columns: slice) -> tuple[Rule, int | None]:
    """The rule for a block, and the expert to give it: given factors that were cut to a block are one expert's."""
    if not isinstance(rule, FixedFactors):
        return rule, expert
    whole = rule.factors(torch.empty(0), expert)
    return FixedFactors(whole.L[rows], whole.K[columns]), None


def _stored_index(matrix: Matrix, expert: int | None, rows: slice, columns: slice) -> Callable[[int], str]:
    """Says where the value of a block with a given flattened index is stored: ``name[expert, row, column]``."""

    def place(index: int) -> str:
        row, column = divmod(index, columns.stop - columns.start)
        at = [rows.start + row, columns.start + column]
        return f"{matrix.tensor}{([] if expert is None else [expert]) + (at[::-1] if matrix.transposed else at)}"

    return place


def _blocks(
    source: CheckpointTensors, written: CheckpointTensors, edit: MatrixEdit, expert: int | None
) -> Iterator[tuple[Tensor, Tensor, slice, slice, Callable[[Tensor, Tensor], Tensor]]]:
    """Blocks of a matrix ``[out, in]``: as in the source and as written, in their storage types (float32 if packed).

    With each block come its rows and columns, and a function that gives the largest rounding error of values that
    are known up to an error.
    """
    axis = _axis(edit)
    sizes = (edit.matrix.out_features, edit.matrix.in_features)
    step = max(1, _BLOCK // sizes[1 - axis])
    readers = [_StoredMatrix(tensors, edit.matrix, expert, axis) for tensors in (source, written)]
    for start in range(0, sizes[axis], step):
        part = slice(start, min(start + step, sizes[axis]))
        before, after = (reader.part(part) for reader in readers)
        rows, columns = (part, slice(0, sizes[1])) if axis == _ROWS else (slice(0, sizes[0]), part)
        yield before, after, rows, columns, readers[1].rounding(rows, columns)


class _StoredMatrix:
    """Reads rows or columns of one matrix (of one expert) from disk, in its storage type; as float32 if it is packed.

    If they are not contiguous on disk, the whole matrix is held in memory; so is a packed matrix, in its packed form.
    """

    def __init__(self, tensors: CheckpointTensors, matrix: Matrix, expert: int | None, axis: int) -> None:
        self.tensors, self.matrix, self.axis = tensors, matrix, axis
        self.whole: Tensor | None = None
        self.packed: PackedMatrix | None = None
        if matrix.tensor in tensors.packed:
            self.packed = tensors.read_packed(matrix.tensor, expert)
            if not self.packed.codec.by_regions:
                self.whole = self.decoded(WHOLE, WHOLE)
            return
        info = tensors[matrix.tensor]
        self.dtype = TORCH_TYPES[info.dtype]
        self.shape = (1, *matrix.shape)[-2:]
        self.size = info.size if expert is None else info.size // info.shape[0]
        self.offset = (expert or 0) * self.size
        if (axis == _ROWS) == matrix.transposed:
            self.whole = self.stored(0, self.shape[0])

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` on disk, as a part of ``W`` ``[out, in]``."""
        width = self.size // max(self.shape[0], 1)
        data = self.tensors.read_bytes(self.matrix.tensor, self.offset + start * width, (stop - start) * width)
        values = stored_tensor(data, self.tensors[self.matrix.tensor].dtype, (stop - start, self.shape[1]))
        return values.T if self.matrix.transposed else values

    def decoded(self, rows: slice, columns: slice) -> Tensor:
        """A part of a packed ``W`` ``[out, in]``."""
        assert self.packed is not None
        return self.packed.decode(columns, rows).T if self.matrix.transposed else self.packed.decode(rows, columns)

    def part(self, part: slice) -> Tensor:
        """Rows or columns of ``W`` ``[out, in]``."""
        if self.whole is not None:
            return self.whole[part] if self.axis == _ROWS else self.whole[:, part]
        if self.packed is not None:
            return self.decoded(part, WHOLE) if self.axis == _ROWS else self.decoded(WHOLE, part)
        return self.stored(part.start, part.stop)

    def rounding(self, rows: slice, columns: slice) -> Callable[[Tensor, Tensor], Tensor]:
        """The largest rounding error of float64 values of some rows and columns of ``W``, known up to an error."""
        packed = self.packed
        if packed is None:
            return lambda values, error: _half_spacing(values.abs() + error, self.dtype)
        codec = packed.codec
        assert isinstance(codec, WritableCodec)

        def spacing(values: Tensor) -> Tensor:
            if self.matrix.transposed:
                return codec.spacing(packed, Region(columns, rows, values.T)).T.double()
            return codec.spacing(packed, Region(rows, columns, values)).double()

        return lambda values, error: torch.maximum(spacing(values - error), spacing(values + error))

"""Least-squares ablation, in the spirit of closed-form model editing (ROME 2202.05262, MEMIT 2210.07229).

Each writer changes by ``-s r k^T``. The key ``k`` is the ridge regression, over the writer's inputs ``x``, of the
target ``r.Wx - mean_harmless(r.Wx)`` on harmful prompts and the target 0 on harmless ones:

    k = (C_harmful + C_harmless + rho I)^-1 c,   c = mean_harmful x (r.Wx - mean_harmless(r.Wx))

with second moments ``C``, and ``rho`` a fraction of their mean diagonal. A writer with more input features than samples
is solved in the dual form, over samples, which gives the same ``k``. For a writer with a post-norm, ``gamma * r``
replaces ``r``.

Several directions give an edit of the same rank: the basis is orthonormal, so that the squared errors along its axes
add up, and each axis has an independent key. One Cholesky factorisation serves all directions of a writer. A negative
strength strengthens refusal: the key responds to harmful prompts, and little to harmless ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors, Rescale
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import weight_of
from ollama_forge.edits.method import EditMethod, FitContext
from ollama_forge.edits.orthogonal import output_basis
from ollama_forge.edits.plan import EditPlan, MatrixEdit, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.progress import bar

RIDGE = 0.01
Weight = Callable[[Matrix], Tensor]


def least_squares_writers(model: ModelMap, settings: EditSettings) -> list[Matrix]:
    """The writers that these settings edit.

    Raises:
        UsageError: least squares does not support a setting.
        ForgeError: the settings leave no writer to edit, or a writer is a stack of experts.
    """
    _check(settings)
    chosen = [writer for writer in model.writers if settings.reason_to_skip(writer, model.n_layers) is None]
    if any(writer.experts for writer in chosen):
        raise ForgeError(
            f"least squares does not support the experts of {model.model_type}", "use --factors orthogonal"
        )
    if not chosen:
        raise ForgeError("these settings leave no layer to edit", "lower --skip-begin-layers and --skip-end-layers")
    return chosen


def _check(settings: EditSettings) -> None:
    if settings.roles - {Role.O, Role.DOWN}:
        raise UsageError("least squares edits residual writers alone", "use --targets writers")
    if settings.norm_preserving:
        raise UsageError("least squares has no norm rule", "leave out --norm-preserving")


def fit_keys(inputs: WriterInputs, projections: Tensor, ridge: float = RIDGE) -> Tensor:
    """The keys of one writer, computed on the device of the harmless statistics.

    Args:
        projections: ``r^T W`` ``[k, in]`` of k directions, so that ``r.Wx`` is ``projection @ x``.
        ridge: ``rho`` as a fraction of the mean diagonal of the second moments.

    Returns:
        ``[k, in]``, one key per direction; NaN if the second moment is not positive definite (all inputs are zero, or
        some are not finite).
    """
    statistics = inputs.harmless_rows if inputs.harmless_moment is None else inputs.harmless_moment
    assert statistics is not None
    harmful, mean, projections = (
        tensor.to(statistics.device) for tensor in (inputs.harmful, inputs.harmless_last_mean, projections)
    )
    count, width = harmful.shape
    targets = harmful @ projections.T - projections @ mean
    if inputs.harmless_moment is not None:
        moment = torch.addmm(statistics, harmful.T, harmful, alpha=1 / count)
        moment.diagonal().add_(ridge * moment.diagonal().mean())
        return _solve(moment, harmful.T @ targets / count).T
    rows = torch.cat([harmful / count**0.5, statistics])  # rows.T @ rows is the sum of the moments
    gram = rows @ rows.T
    gram.diagonal().add_(ridge * gram.diagonal().sum() / width)
    padded = torch.cat([targets / count**0.5, targets.new_zeros(len(statistics), len(projections))])
    return (rows.T @ _solve(gram, padded)).T


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` for symmetric ``[n, n]`` and ``[n, k]``; NaN if it is not positive definite."""
    triangle, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed == 0, torch.cholesky_solve(right, triangle), torch.nan)


def fit_least_squares(
    model: ModelMap,
    directions: Mapping[str, RefusalDirection],
    groups: Iterable[Mapping[str, WriterInputs]],
    weight: Weight,
    read: ReadVector,
) -> dict[str, dict[str, FixedFactors]]:
    """Fit the factors of every writer for several directions, in one pass over the inputs.

    Args:
        directions: directions by name; each is one vector, several joint vectors, or one vector per layer.
        groups: inputs by writer, as ``gather_writer_inputs`` yields them; each group is freed before the next is made.
        weight: returns a writer's matrix as float32 ``[out, in]``.

    Returns:
        name of the direction -> tensor name -> factors ``L`` ``[out, k]``, ``K`` ``[in, k]``.

    Raises:
        ForgeError: a writer's inputs are all zero, or its fit is not finite.
    """
    matrices = {matrix.tensor: matrix for matrix in model.matrices}
    out: dict[str, dict[str, FixedFactors]] = {name: {} for name in directions}
    for group in groups:
        for tensor, inputs in group.items():
            matrix = matrices[tensor]
            values = weight(matrix).cpu()
            bases = [output_basis(matrix, d.for_layer(matrix.layer or 0), read) for d in directions.values()]
            keys = fit_keys(inputs, torch.cat(bases, dim=1).T @ values).cpu()
            if not torch.isfinite(keys).all():
                raise ForgeError(
                    f"least squares cannot be fitted to {tensor}: its inputs on these prompts are zero or not finite",
                    "give more instructions, or --factors orthogonal",
                )
            ranks = [basis.shape[1] for basis in bases]
            for name, basis, basis_keys in zip(directions, bases, torch.split(keys, ranks), strict=True):
                out[name][tensor] = FixedFactors(basis.contiguous(), basis_keys.T.contiguous())
        del group, inputs  # else the loop's variables keep this group in memory while the next one is gathered
    return out


def plan_least_squares(
    model: ModelMap, factors: Mapping[str, FixedFactors], settings: EditSettings, layer: float | None
) -> EditPlan:
    """The plan that applies fitted factors at the strengths of the settings, without a norm rule.

    Args:
        layer: the direction's layer, at which a strength kernel peaks.
    """
    writers: Sequence[Matrix] = least_squares_writers(model, settings)
    edits = {
        writer.tensor: MatrixEdit(
            writer, factors[writer.tensor], settings.strength_of(writer, model.n_layers, layer), Rescale.NONE
        )
        for writer in writers
    }
    skipped = {
        matrix.tensor: settings.reason_to_skip(matrix, model.n_layers) or "not a residual writer"
        for matrix in model.matrices
        if matrix.tensor not in edits
    }
    return EditPlan("least-squares", edits, skipped, projects=False)


class LeastSquares(EditMethod):
    """Least-squares ablation: the factors are fitted at strength 1, and then applied at any strength."""

    fits = True

    def check(self, settings: EditSettings) -> None:
        _check(settings)

    def fit(
        self, context: FitContext, settings: EditSettings, directions: Mapping[str, RefusalDirection]
    ) -> dict[str, FittedFactors]:
        model = context.model
        writers = least_squares_writers(model.model_map, settings)
        with bar("fitting least squares", len(context.harmful) + len(context.harmless)) as advance:
            groups = gather_writer_inputs(
                model, writers, context.harmful, context.harmless, seed=context.seed, progress=advance
            )
            fitted = fit_least_squares(
                model.model_map, directions, groups, lambda matrix: weight_of(model, matrix), context.read
            )
        return {name: FittedFactors(factors) for name, factors in fitted.items()}

    def plan(
        self,
        model: ModelMap,
        direction: RefusalDirection,
        fitted: FittedFactors,
        settings: EditSettings,
        read: ReadVector,
    ) -> EditPlan:
        if not fitted:
            raise UsageError(
                "least squares needs factors that are fitted to the model, and a direction file has none",
                "write them with compute-dir --factors least-squares, and give that file to apply --edit",
            )
        return plan_least_squares(model, fitted.by_tensor, settings, direction.layer)


METHOD: EditMethod = LeastSquares()

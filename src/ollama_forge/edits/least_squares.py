"""Least-squares ablation, in the spirit of closed-form model editing (ROME 2202.05262, MEMIT 2210.07229).

Each writer changes by ``-s r k^T``. Its key ``k`` is the ridge regression, over its own inputs ``x``, of
``r.Wx - mean_harmless(r.Wx)`` on harmful prompts and of 0 on harmless ones:

    k = (C_harmful + C_harmless + rho I)^-1 c,   c = mean_harmful x (r.Wx - mean_harmless(r.Wx))

with second moments ``C`` and ``rho`` a share of their mean diagonal. Where a writer has more inputs than there are
samples the same ``k`` is found in the dual, over samples. Behind a post-norm, ``gamma * r`` stands for ``r``.

Several directions make an edit of their rank: the basis is orthonormal, so the errors along its axes add up, and each
axis has the key that fits it alone. One Cholesky factorisation serves all directions of a writer. A negative strength
strengthens what the key answers to: the key hardly responds to harmless prompts, so those change little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import Given, Rescale
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
        UsageError: settings that have no meaning here.
        ForgeError: no writer is left, or experts' inputs would have to be told apart.
    """
    _check(settings)
    chosen = [writer for writer in model.writers if settings.reason_to_skip(writer, model.n_layers) is None]
    if any(writer.experts for writer in chosen):
        raise ForgeError(
            f"least squares is not available for the experts of {model.model_type}", "--factors orthogonal"
        )
    if not chosen:
        raise ForgeError("these settings leave no layer to edit", "lower --skip-begin-layers and --skip-end-layers")
    return chosen


def _check(settings: EditSettings) -> None:
    if settings.roles - {Role.O, Role.DOWN}:
        raise UsageError("least squares edits residual writers alone", "--targets writers")
    if settings.norm_preserving:
        raise UsageError("least squares has no norm rule", "leave out --norm-preserving")


def fit_keys(inputs: WriterInputs, projections: Tensor, ridge: float = RIDGE) -> Tensor:
    """The keys of one writer, computed on the device of the harmless moment.

    Args:
        projections: ``r^T W`` ``[k, in]`` of k directions, so that ``r.Wx`` is ``projection @ x``.
        ridge: ``rho`` as a share of the mean diagonal of the second moments.

    Returns:
        ``[k, in]``, a key for each direction; NaN where the second moment is not positive definite (all inputs are
        zero, or some are not finite).
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
    """Solve for a symmetric matrix ``[n, n]`` and right-hand sides ``[n, k]``; NaN if it is not positive definite."""
    triangle, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed == 0, torch.cholesky_solve(right, triangle), torch.nan)


def fit_least_squares(
    model: ModelMap,
    directions: Mapping[str, RefusalDirection],
    groups: Iterable[Mapping[str, WriterInputs]],
    weight: Weight,
    read: ReadVector,
) -> dict[str, dict[str, Given]]:
    """Factors of every writer for several directions (each of one vector, several joint ones, or one for each layer).

    The gathered inputs are gone through once for all directions.

    Args:
        directions: name -> direction.
        groups: writers' inputs, as ``gather_writer_inputs`` yields them; each group is dropped before the next is made.
        weight: gives a writer's matrix as float32 ``[out, in]``.

    Returns:
        name of the direction -> tensor name -> factors ``L`` ``[out, k]``, ``K`` ``[in, k]``.

    Raises:
        ForgeError: a writer's inputs are all zero, or its fit is not finite.
    """
    matrices = {matrix.tensor: matrix for matrix in model.matrices}
    out: dict[str, dict[str, Given]] = {name: {} for name in directions}
    for group in groups:
        for tensor, inputs in group.items():
            matrix = matrices[tensor]
            values = weight(matrix).cpu()
            bases = [output_basis(matrix, each.for_layer(matrix.layer or 0), read) for each in directions.values()]
            keys = fit_keys(inputs, torch.cat(bases, dim=1).T @ values).cpu()
            if not torch.isfinite(keys).all():
                raise ForgeError(
                    f"least squares cannot be fitted to {tensor}: its inputs on these prompts are zero or not finite",
                    "give more instructions, or --factors orthogonal",
                )
            ranks = [basis.shape[1] for basis in bases]
            for name, basis, own in zip(directions, bases, torch.split(keys, ranks), strict=True):
                out[name][tensor] = Given(basis.contiguous(), own.T.contiguous())
        del group, inputs  # the loop's variables would keep this group in memory while the next one is gathered
    return out


def plan_least_squares(
    model: ModelMap, factors: Mapping[str, Given], settings: EditSettings, layer: float | None
) -> EditPlan:
    """The plan of fitted factors at the settings' strengths, without a norm rule.

    Args:
        layer: the direction's layer, where a strength kernel peaks.
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
    """Least-squares ablation: factors are fitted to the fit prompts, and strengths are free afterwards."""

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
                "least squares needs factors that were fitted to the model, and a direction alone has none",
                "compute-dir --factors least-squares writes them; give that file to apply --edit",
            )
        return plan_least_squares(model, fitted.by_tensor, settings, direction.layer)


METHOD: EditMethod = LeastSquares()

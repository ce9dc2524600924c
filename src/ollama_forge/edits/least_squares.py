"""Least-squares ablation, in the spirit of closed-form model editing (ROME 2202.05262, MEMIT 2210.07229).

Each writer changes by ``-s r k^T``. Its key ``k`` is the ridge regression, over its own inputs ``x``, of
``r.Wx - mean_harmless(r.Wx)`` on harmful prompts and of 0 on harmless ones:

    k = (C_harmful + C_harmless + rho I)^-1 c,   c = mean_harmful x (r.Wx - mean_harmless(r.Wx))

with second moments ``C`` and ``rho`` a share of their mean diagonal. Where a writer has more inputs than there are
samples the same ``k`` is found in the dual, over samples. Behind a post-norm, ``gamma * r`` stands for ``r``.
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


def fit_key(inputs: WriterInputs, projection: Tensor, ridge: float = RIDGE) -> Tensor:
    """The key ``k`` ``[in]`` of one writer.

    Args:
        projection: ``W^T r`` ``[in]``, so that ``r.Wx`` is ``x @ projection``.
        ridge: ``rho`` as a share of the mean diagonal of the second moments.
    """
    harmful = inputs.harmful
    target = harmful @ projection - inputs.harmless_last_mean @ projection
    count, width = harmful.shape
    if inputs.harmless_moment is not None:
        moment = torch.addmm(inputs.harmless_moment, harmful.T, harmful, alpha=1 / count)
        moment.diagonal().add_(ridge * moment.diagonal().mean())
        key: Tensor = torch.linalg.solve(moment, harmful.T @ target / count)
        return key
    assert inputs.harmless_rows is not None
    rows = torch.cat([harmful / count**0.5, inputs.harmless_rows])  # rows.T @ rows is the sum of the moments
    gram = rows @ rows.T
    rho = ridge * gram.diagonal().sum() / width
    targets = torch.cat([target / count**0.5, torch.zeros(len(inputs.harmless_rows))])
    gram.diagonal().add_(rho)
    weights: Tensor = torch.linalg.solve(gram, targets)
    return rows.T @ weights


def fit_least_squares(
    model: ModelMap,
    directions: Mapping[str, RefusalDirection],
    groups: Iterable[Mapping[str, WriterInputs]],
    weight: Weight,
    read: ReadVector,
) -> dict[str, dict[str, Given]]:
    """Factors of every writer for every direction, one pass over the gathered inputs for all.

    Args:
        directions: name -> single direction.
        groups: writers' inputs, as ``gather_writer_inputs`` yields them; each group is forgotten before the next.
        weight: gives a writer's matrix as float32 ``[out, in]``.

    Returns:
        name of the direction -> tensor name -> factors.

    Raises:
        ForgeError: the fit is not finite.
    """
    matrices = {matrix.tensor: matrix for matrix in model.matrices}
    out: dict[str, dict[str, Given]] = {name: {} for name in directions}
    for group in groups:
        for tensor, inputs in group.items():
            matrix = matrices[tensor]
            values = weight(matrix).cpu()
            for name, direction in directions.items():
                basis = output_basis(matrix, direction.for_layer(matrix.layer or 0)[:1], read)
                key = fit_key(inputs, values.T @ basis[:, 0])
                if not torch.isfinite(key).all():
                    raise ForgeError(f"the least-squares fit of {tensor} is not finite", "try more instructions")
                out[name][tensor] = Given(basis.contiguous(), key.unsqueeze(1).contiguous())
    return out


def plan_least_squares(
    model: ModelMap, factors: Mapping[str, Given], settings: EditSettings, layer: float | None
) -> EditPlan:
    """The plan of fitted factors at the settings' strengths; least squares carries no norm rule.

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

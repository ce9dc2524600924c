"""Least-squares ablation, in the spirit of closed-form model editing (ROME 2202.05262, MEMIT 2210.07229).

Each writer changes by ``-s r k^T``. The key ``k`` is the ridge regression, over the writer's inputs ``x``, of the
target ``r.Wx - mean_harmless(r.Wx)`` on harmful prompts and the target 0 on harmless inputs:

    k = (C_harmful + a C_harmless + rho I)^-1 c,   c = mean_harmful x (r.Wx - mean_harmless(r.Wx))

with second moments ``C``, the weight ``a`` of harmless inputs, and ``rho`` a fraction of the moments' mean diagonal.
The harmless mean of ``r.Wx`` is that at the last positions of prompts. A writer with more input features than samples
is solved in the dual form, over samples, which gives the same ``k``. For a writer with a post-norm, ``gamma * r``
replaces ``r``.

The edit leaves alone what ``C_harmless`` holds, so what it holds decides the damage: the harmless instructions that are
parallel to the harmful ones, varied general conversations, and the model's own answers to both (see
``activations/samples.py``). On a chat model of 0.5 B parameters, with 2 to 4 of 96 harmful prompts still refused, the
first-token KL divergence on other harmless prompts was 0.080 with the parallel instructions alone, and 0.028 with 512
general ones and 16 tokens of each answer; the KL divergence over whole answers was 0.030 and 0.008.

Several directions give an edit of the same rank: the basis is orthonormal, so that the squared errors along its axes
add up, and each axis has an independent key. One Cholesky factorisation serves all directions of a writer. A negative
strength strengthens refusal: the key responds to harmful prompts, and little to harmless ones.

Each routed expert has a key of its own, fitted to the inputs that are routed to it. The experts' features do not
correspond, so what an expert that saw few inputs can take from its layer is two numbers: the mean square of a feature,
which is added to ``rho`` with the weight of ``PRIOR_ROWS`` inputs, and the harmless mean of ``r.Wx``, with the same
weight. So an expert's key shrinks towards zero the fewer inputs it saw, and is zero if it saw none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ollama_forge.activations.samples import Samples, harmful_samples, harmless_samples, most_samples
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs, held_size, keeps_moment, units
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.read_matrix import experts_a_token, experts_of
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors, Rescale
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.method import ANSWER_TOKENS, EditMethod, FitContext, FitSize
from ollama_forge.edits.orthogonal import output_basis
from ollama_forge.edits.plan import EditPlan, MatrixEdit, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.matrices import weight_of
from ollama_forge.progress import bar
from ollama_forge.prompts.split import PartPrompts

_BYTES = 4  # of a float32
RIDGE = 0.01  # rho, as a fraction of the mean diagonal of the second moments
HARMLESS_WEIGHT = 1.0  # a
# More rows keep experts that saw few inputs closer to what they were: less damage, and more refusals left.
PRIOR_ROWS = 2.0
Weight = Callable[[Matrix, int | None], Tensor]


def least_squares_writers(model: ModelMap, settings: EditSettings) -> list[Matrix]:
    """The writers that these settings edit; a vector that is added to the stream has no input to fit a key to.

    Raises:
        UsageError: least squares does not support a setting.
        ForgeError: the settings leave no writer to edit.
    """
    _check(settings)
    chosen = [writer for writer in model.writers if settings.reason_to_skip(writer, model.n_layers) is None]
    chosen = [writer for writer in chosen if not writer.rows_are_written]
    if not chosen:
        raise ForgeError("these settings leave no layer to edit", "lower --skip-begin-layers and --skip-end-layers")
    return chosen


def _check(settings: EditSettings) -> None:
    if settings.roles - {Role.O, Role.DOWN}:
        raise UsageError("least squares edits residual writers alone", "use --targets writers")
    if settings.norm_preserving:
        raise UsageError("least squares has no norm rule", "leave out --norm-preserving")


@dataclass(frozen=True)
class ExpertPool:
    """What the experts of a layer saw together.

    Attributes:
        mean_square: mean diagonal of the second moments of an expert's inputs.
        baseline: ``[k]``, the mean of ``r.Wx`` for k directions at the last positions of harmless prompts.
    """

    mean_square: float
    baseline: Tensor

    @classmethod
    def of(cls, experts: Sequence[tuple[WriterInputs, Tensor]]) -> ExpertPool:
        """The pool of all experts of a layer, each with its projections ``[k, in]``."""
        width = experts[0][1].shape[-1]
        rows = sum(len(inputs.harmful) for inputs, _ in experts)
        squares = sum(len(inputs.harmful) * float(_moment_trace(inputs)) for inputs, _ in experts)
        last = sum(inputs.harmless_last for inputs, _ in experts)
        means = [inputs.harmless_last * (projected @ inputs.harmless_last_mean) for inputs, projected in experts]
        return cls(squares / max(rows, 1) / width, torch.stack(means).sum(0) / max(last, 1))


def _moment_trace(inputs: WriterInputs, harmless_weight: float = HARMLESS_WEIGHT) -> Tensor:
    """The trace of the weighted sum of both second moments; 0 for a side without inputs."""
    harmful = inputs.harmful.square().sum() / max(len(inputs.harmful), 1)
    if inputs.harmless_moment is not None:
        return harmful + harmless_weight * inputs.harmless_moment.diagonal().sum().cpu()
    assert inputs.harmless_rows is not None
    return harmful + harmless_weight * inputs.harmless_rows.square().sum()


def fit_keys(
    inputs: WriterInputs,
    projections: Tensor,
    pool: ExpertPool | None = None,
    *,
    ridge: float = RIDGE,
    harmless_weight: float = HARMLESS_WEIGHT,
) -> Tensor:
    """The keys of one writer, computed on the device of the harmless statistics.

    Args:
        projections: ``r^T W`` ``[k, in]`` of k directions, so that ``r.Wx`` is ``projection @ x``.
        pool: what the experts of the layer saw together, if the writer is one of them.
        ridge: ``rho`` as a fraction of the mean diagonal of the weighted sum of the second moments.
        harmless_weight: ``a``, the weight of the harmless second moment; that of the harmful one is 1.

    Returns:
        ``[k, in]``, one key per direction; NaN if the second moment is not positive definite (all inputs are zero, or
        some are not finite). Zero for an expert that saw no harmful input.
    """
    count, width = inputs.harmful.shape
    if pool is not None and not count:
        return torch.zeros_like(projections)
    statistics = inputs.harmless_rows if inputs.harmless_moment is None else inputs.harmless_moment
    assert statistics is not None
    baseline, extra = projections @ inputs.harmless_last_mean, 0.0
    if pool is not None:
        last = inputs.harmless_last
        baseline = (last * baseline + PRIOR_ROWS * pool.baseline) / (last + PRIOR_ROWS)
        extra = PRIOR_ROWS / count * pool.mean_square
    rho = ridge * float(_moment_trace(inputs, harmless_weight)) / width + extra
    harmful, projections, baseline = (t.to(statistics.device) for t in (inputs.harmful, projections, baseline))
    targets = harmful @ projections.T - baseline
    if inputs.harmless_moment is not None:
        moment = torch.addmm(statistics, harmful.T, harmful, beta=harmless_weight, alpha=1 / count)
        moment.diagonal().add_(rho)
        return _solve(moment, harmful.T @ targets / count).T
    rows = torch.cat([harmful / count**0.5, harmless_weight**0.5 * statistics])  # rows.T @ rows is the moments' sum
    gram = rows @ rows.T
    gram.diagonal().add_(rho)
    padded = torch.cat([targets / count**0.5, targets.new_zeros(len(statistics), len(projections))])
    return (rows.T @ _solve(gram, padded)).T


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` for symmetric ``[n, n]`` and ``[n, k]``; NaN if it is not positive definite.

    ``matrix`` is overwritten: a copy would take as much memory again as the second moment.
    """
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    lower = matrix.mT  # in the order of columns, which is LAPACK's
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    halfway = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.where(failed == 0, torch.linalg.solve_triangular(matrix, halfway, upper=True), torch.nan)


def fit_least_squares(
    model: ModelMap,
    directions: Mapping[str, RefusalDirection],
    groups: Iterable[Mapping[str, Sequence[WriterInputs]]],
    weight: Weight,
    read: ReadVector,
    known: dict[str, dict[str, FixedFactors]] | None = None,
) -> dict[str, dict[str, FixedFactors]]:
    """Fit the factors of every writer for several directions, in one pass over the inputs.

    Args:
        directions: directions by name; each is one vector, several joint vectors, or one vector per layer.
        groups: inputs by writer, as ``gather_writer_inputs`` yields them; each group is freed before the next is made.
        weight: returns a writer's matrix (of one expert, if it is a stack) as float32 ``[out, in]``.
        known: factors that are fitted already, by direction and tensor; the new ones are added to it.

    Returns:
        name of the direction -> tensor name -> factors ``L`` ``[out, k]``, ``K`` ``[in, k]``; of a stack of experts
        with a leading expert axis.

    Raises:
        ForgeError: a writer's inputs are all zero, or its fit is not finite.
    """
    out: dict[str, dict[str, FixedFactors]] = {name: {} for name in directions} if known is None else known
    for group in groups:
        writers = [matrix for matrix in model.matrices if matrix.tensor in group]
        bases = {
            w.tensor: [output_basis(w, d.for_layer(w.layer or 0), read) for d in directions.values()] for w in writers
        }
        for unit in units(writers):
            keys = _fit_unit(unit, group, {w.tensor: torch.cat(bases[w.tensor], dim=1) for w in unit}, weight)
            for writer in unit:
                ranks = [basis.shape[1] for basis in bases[writer.tensor]]
                parts = torch.split(keys[writer.tensor], ranks, dim=1)
                for name, basis, key in zip(directions, bases[writer.tensor], parts, strict=True):
                    left, right = basis.expand(len(key), *basis.shape), key.mT
                    factors = (left, right) if writer.experts else (left[0], right[0])
                    out[name][writer.tensor] = FixedFactors(*(side.contiguous() for side in factors))
        del group  # else the loop's variable keeps this group in memory while the next one is gathered
    return out


def _fit_unit(
    unit: Sequence[Matrix], group: Mapping[str, Sequence[WriterInputs]], bases: Mapping[str, Tensor], weight: Weight
) -> dict[str, Tensor]:
    """The keys ``[experts, k, in]`` of one writer (with one expert), or of all experts of a layer."""
    projections = {
        w.tensor: torch.stack([bases[w.tensor].T @ weight(w, expert).cpu() for expert in experts_of(w)]) for w in unit
    }
    pool = None
    if unit[0].is_expert:
        seen = [pair for w in unit for pair in zip(group[w.tensor], projections[w.tensor], strict=True)]
        pool = ExpertPool.of(seen)
    keys: dict[str, Tensor] = {}
    for writer in unit:
        pairs = zip(group[writer.tensor], projections[writer.tensor], strict=True)
        keys[writer.tensor] = torch.stack([fit_keys(inputs, projected, pool).cpu() for inputs, projected in pairs])
        if not torch.isfinite(keys[writer.tensor]).all():
            raise ForgeError(
                f"least squares cannot be fitted to {writer.tensor}: its inputs are zero or not finite",
                "give more instructions, or --factors orthogonal",
            )
    return keys


def plan_least_squares(model: ModelMap, fitted: FittedFactors, settings: EditSettings, layer: float | None) -> EditPlan:
    """The plan that applies fitted factors at the strengths of the settings, without a norm rule.

    Args:
        layer: the direction's layer, at which a strength kernel peaks.
    """
    writers: Sequence[Matrix] = least_squares_writers(model, settings)
    edits = {
        writer.tensor: MatrixEdit(
            writer, fitted.by_tensor[writer.tensor], settings.strength_of(writer, model.n_layers, layer), Rescale.NONE
        )
        for writer in writers
    }
    skipped = {
        matrix.tensor: settings.reason_to_skip(matrix, model.n_layers) or "not a residual writer with an input"
        for matrix in model.matrices
        if matrix.tensor not in edits
    }
    return EditPlan("least-squares", edits, skipped, projects=False, fitted_to=fitted.fitted_to)


def _working_size(writers: Sequence[Matrix], samples: int) -> int:
    """Bytes that the fit of one writer takes, at most: its matrix in float32, then what is factorised."""
    sizes = [0]
    for writer in writers:
        width = writer.in_features
        moment = keeps_moment(width, samples) and not writer.is_expert
        fit = width**2 if moment else 2 * samples * width + samples**2
        sizes.append(_BYTES * max(fit, math.prod(writer.shape[-2:])))
    return max(sizes)


def _pass_key(
    writers: Sequence[Matrix], directions: Mapping[str, RefusalDirection], harmful: Samples, harmless: Samples
) -> dict[str, Any]:
    """All that the factors depend on, beside the model."""
    return {
        "pass": "least squares",
        "writers": [writer.tensor for writer in writers],
        "directions": {name: [found.per_layer, found.vectors.tolist()] for name, found in directions.items()},
        "samples": [[side.sequences, list(side.positions.values())] for side in (harmful, harmless)],
    }


def _statistics(fitted: Mapping[str, Mapping[str, FixedFactors]]) -> dict[str, Tensor]:
    """The factors fitted so far, for the journal of a pass."""
    return {
        f"{number}.{side}.{tensor}": getattr(factors, side)
        for number, found in enumerate(fitted.values())
        for tensor, factors in found.items()
        for side in ("L", "K")
    }


def _kept(directions: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, FixedFactors]]:
    """The factors that the journal of an interrupted pass holds, by direction and tensor."""
    found: dict[str, dict[str, FixedFactors]] = {name: {} for name in directions}
    for number, name in enumerate(found):
        prefix = f"{number}.L."
        for key in (key for key in tensors if key.startswith(prefix)):
            tensor = key.removeprefix(prefix)
            found[name][tensor] = FixedFactors(tensors[key], tensors[f"{number}.K.{tensor}"])
    return found


class LeastSquares(EditMethod):
    """Least-squares ablation: the factors are fitted at strength 1, and then applied at any strength."""

    fits = True

    def check(self, settings: EditSettings) -> None:
        _check(settings)

    def fit_size(
        self, model: ModelMap, config: Mapping[str, Any], settings: EditSettings, prompts: PartPrompts
    ) -> FitSize:
        writers = least_squares_writers(model, settings)
        harmless = len(prompts.harmless) + len(prompts.general)
        bad, good = most_samples(len(prompts.harmful), harmless, ANSWER_TOKENS)
        held = held_size(writers, bad, good, experts_a_token(config) or 1)
        return FitSize(held, _working_size(writers, bad + good))

    def fit(
        self, context: FitContext, settings: EditSettings, directions: Mapping[str, RefusalDirection]
    ) -> dict[str, FittedFactors]:
        model = context.model
        config: Any = model.module.config
        size = self.fit_size(model.model_map, config.to_dict(), settings, context.prompts)
        with model.reserving(size.held, size.working, "least squares"):  # before the answers, which are many passes
            return self._fit(context, least_squares_writers(model.model_map, settings), directions)

    def _fit(
        self, context: FitContext, writers: Sequence[Matrix], directions: Mapping[str, RefusalDirection]
    ) -> dict[str, FittedFactors]:
        model = context.model
        harmful = harmful_samples(context.harmful, context.seed)
        harmless = harmless_samples(context.harmless, context.answers, context.seed)
        with bar("fitting least squares", len(harmful.sequences) + len(harmless.sequences)) as advance:
            journal = model.journal(_pass_key(writers, directions, harmful, harmless))
            known = _kept(directions, {} if journal is None else journal.kept)
            if journal is not None:
                journal.statistics = partial(_statistics, known)
            groups = gather_writer_inputs(model, writers, harmful, harmless, progress=advance, journal=journal)
            weight = partial(weight_of, model)
            fitted = fit_least_squares(model.model_map, directions, groups, weight, context.read, known)
            if journal is not None:
                journal.remove()
        positions = {"harmful": harmful.total, **{str(kind): count for kind, count in harmless.counts.items()}}
        fitted_to = {"prompts": context.prompt_counts, "positions": positions}
        return {name: FittedFactors(factors, fitted_to) for name, factors in fitted.items()}

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
        return plan_least_squares(model, fitted, settings, direction.layer)


METHOD: EditMethod = LeastSquares()

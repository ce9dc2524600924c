"""A third edit method in one file: it halves the attention output along the direction, with fitted factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors, Rescale
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.method import EditMethod, FitContext
from ollama_forge.edits.plan import EditPlan, MatrixEdit, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.models.matrices import weight_of


class Halve(EditMethod):
    fits = True

    def check(self, settings: EditSettings) -> None:
        if settings.norm_preserving:
            raise UsageError("halving has no norm rule", "leave out --norm-preserving")

    def fit(
        self, context: FitContext, settings: EditSettings, directions: Mapping[str, RefusalDirection]
    ) -> dict[str, FittedFactors]:
        model = context.model
        fitted: dict[str, FittedFactors] = {}
        for name, direction in directions.items():
            factors = {}
            for matrix in model.model_map.matrices:
                if matrix.role is Role.O:
                    left = direction.for_layer(matrix.layer or 0).T.contiguous()
                    factors[matrix.tensor] = FixedFactors(left, torch.mm(weight_of(model, matrix).T, left) / 2)
            fitted[name] = FittedFactors(factors)
        return fitted

    def plan(
        self,
        model: ModelMap,
        direction: RefusalDirection,
        fitted: FittedFactors,
        settings: EditSettings,
        read: ReadVector,
    ) -> EditPlan:
        edits = {
            matrix.tensor: MatrixEdit(matrix, fitted.by_tensor[matrix.tensor], settings.strength, Rescale.NONE)
            for matrix in model.matrices
            if matrix.tensor in fitted.by_tensor
        }
        skipped = {matrix.tensor: "not attention's output" for matrix in model.matrices if matrix.tensor not in edits}
        return EditPlan("halve", edits, skipped, projects=False)


METHOD: EditMethod = Halve()

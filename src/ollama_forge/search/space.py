"""The space that a study searches: least-squares edits, whose factors are fitted once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import optuna

from ollama_forge.edits.settings import KERNELS
from ollama_forge.search.candidates import Candidate, layer_name, least_squares

STRENGTHS = (0.25, 4.0)
STRENGTH_STEP = 0.25
BALANCE_STEP = 0.25


@dataclass(frozen=True)
class Space:
    """The edits of one model, as parameters.

    - ``layer``: the layer of the direction.
    - ``strength``: size of the larger one of two strengths, that of attention and that of MLPs and experts.
    - ``balance``: which one is smaller: 0 for none, -1 for attention at 0, 1 for MLPs and experts at 0.
    - ``kernel``: how the strength falls off with the distance from that layer.

    Attributes:
        layers: the layers whose directions are fitted, in rising order and evenly spaced.
        sign: sign of the strengths.
    """

    layers: tuple[int, ...]
    sign: float

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """The edit whose parameters the sampler of a trial suggests."""
        step = self.layers[1] - self.layers[0] if len(self.layers) > 1 else 1
        layer = trial.suggest_int("layer", self.layers[0], self.layers[-1], step=step)
        strength = trial.suggest_float("strength", *STRENGTHS, step=STRENGTH_STEP)
        balance = trial.suggest_float("balance", -1.0, 1.0, step=BALANCE_STEP)
        kernel = trial.suggest_categorical("kernel", KERNELS)
        attention, mlp = (self.sign * strength * min(1.0, 1.0 + part) for part in (balance, -balance))
        plain = least_squares(layer, self.sign * strength)
        if kernel == KERNELS[0] and balance in (0.0, 1.0):
            return plain if balance == 0.0 else least_squares(layer, self.sign * strength, attention_alone=True)
        settings = replace(plain.settings, attn_strength=attention, mlp_strength=mlp, strength_kernel=kernel)
        name = f"least squares, {layer_name(layer)}, attention {attention:g}, MLP {mlp:g}, {kernel}"
        return Candidate(name, plain.direction, settings)

    def parameters(self, candidate: Candidate) -> dict[str, Any] | None:
        """The parameters of an edit that the ladder tries; None if it is not in the space."""
        strength, layer = candidate.settings.strength * self.sign, candidate.layer
        alone = candidate.settings.mlp_strength is not None
        if layer not in self.layers:
            return None
        if candidate.settings != least_squares(layer, self.sign * strength, attention_alone=alone).settings:
            return None
        if not STRENGTHS[0] <= strength <= STRENGTHS[1] or strength % STRENGTH_STEP:
            return None
        return {"layer": layer, "strength": strength, "balance": float(alone), "kernel": KERNELS[0]}

"""The space that a study searches: least-squares edits, whose factors are fitted once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna

from ollama_forge.edits.settings import KERNELS
from ollama_forge.search.candidates import CONSTANT, Candidate, least_squares_balanced
from ollama_forge.text.closed_thought import Moment

STRENGTHS = (0.25, 4.0)
STRENGTH_STEP = BALANCE_STEP = 0.25


@dataclass(frozen=True)
class Space:
    """The edits of one model, as parameters.

    - ``layer``: the layer of the direction.
    - ``moment``: the token before which the direction is found. A model that does not think has no such parameter.
    - ``strength``: size of the larger one of two strengths, that of attention and that of MLPs and experts.
    - ``balance``: which one is smaller: 0 for none, -1 for attention at 0, 1 for MLPs and experts at 0. A model with
      writers of one kind alone has no such parameter.
    - ``kernel``: how the strength falls off with the distance from that layer.

    Attributes:
        layers: the layers whose directions are fitted, in rising order and evenly spaced.
        sign: sign of the strengths.
        balanced: whether the model has writers of both kinds.
        moments: the moments that the model has directions of.
    """

    layers: tuple[int, ...]
    sign: float
    balanced: bool = True
    moments: tuple[Moment, ...] = (Moment.ANSWER,)

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """The edit whose parameters the sampler of a trial suggests."""
        step = self.layers[1] - self.layers[0] if len(self.layers) > 1 else 1
        layer = trial.suggest_int("layer", self.layers[0], self.layers[-1], step=step)
        moment = self.moments[0]
        if len(self.moments) > 1:
            moment = Moment(trial.suggest_categorical("moment", [found.value for found in self.moments]))
        strength = trial.suggest_float("strength", *STRENGTHS, step=STRENGTH_STEP)
        balance = trial.suggest_float("balance", -1.0, 1.0, step=BALANCE_STEP) if self.balanced else 0.0
        kernel = trial.suggest_categorical("kernel", KERNELS)
        return least_squares_balanced(layer, self.sign * strength, balance, kernel, moment=moment)

    def parameters(self, candidate: Candidate) -> dict[str, Any] | None:
        """The parameters of an edit that the ladder tries; None if it is not in the space."""
        strength, origin = candidate.settings.strength * self.sign, candidate.origin
        if origin is None or origin.layer not in self.layers or origin.moment not in self.moments:
            return None
        balance = candidate.balance
        if candidate.settings != least_squares_balanced(origin.layer, self.sign * strength, balance).settings:
            return None
        if not STRENGTHS[0] <= strength <= STRENGTHS[1] or strength % STRENGTH_STEP or balance % BALANCE_STEP:
            return None
        moment = {"moment": origin.moment.value} if len(self.moments) > 1 else {}
        named = {"balance": balance} if self.balanced else {}
        return {"layer": origin.layer, **moment, "strength": strength, **named, "kernel": CONSTANT}

"""The edits that ``run`` can try, and their names, which ``--pick`` takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ollama_forge.edits.registry import METHODS
from ollama_forge.edits.settings import KERNELS, EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.text.closed_thought import Moment

CONFIGURED = "configured"
CONSTANT = EditSettings.strength_kernel
_LAYER = "layer "
_AT_THOUGHT = " at the thought"
_ORIGIN = rf"{_LAYER}(?P<layer>[0-9]+)(?P<thought>{_AT_THOUGHT})?"
_LEAST_SQUARES = "least squares"
_ATTENTION_ALONE = "least squares, attention alone"
_WRITERS = "orthogonal on writers"
_BY_PART = re.compile(
    rf"{_LEAST_SQUARES}, {_ORIGIN}, attention (?P<attention>[-+.0-9e]+), MLP (?P<mlp>[-+.0-9e]+), "
    rf"(?P<kernel>{'|'.join(KERNELS)})"
)
_NAME = re.compile(
    rf"(?P<kind>{_LEAST_SQUARES}|{_ATTENTION_ALONE}|{_WRITERS}), {_ORIGIN}(?:, strength (?P<strength>[-+.0-9e]+))?"
)


@dataclass(frozen=True)
class Origin:
    """Where a direction is found: at a layer, and before the first token of the answer or of the thought."""

    layer: int
    moment: Moment = Moment.ANSWER

    @property
    def name(self) -> str:
        """The name of the direction."""
        return f"{_LAYER}{self.layer}{_AT_THOUGHT if self.moment is Moment.THOUGHT else ''}"


@dataclass(frozen=True)
class Candidate:
    """An edit to try.

    Attributes:
        name: name in messages and for ``--pick``.
        direction: name of its direction: ``CONFIGURED`` (computed by the direction's settings), ``layer N`` (the
            direction of that layer), or ``layer N at the thought`` (the one before the first token of a thought).
        settings: settings of the edit.
    """

    name: str
    direction: str
    settings: EditSettings

    @property
    def edit(self) -> tuple[str, EditSettings]:
        """What tells it from other candidates of one model, whatever it is called."""
        return self.direction, self.settings

    @property
    def origin(self) -> Origin | None:
        """Where its direction is found; None for ``CONFIGURED`` and for random directions."""
        return origin_of(self.direction)

    @property
    def layer(self) -> int | None:
        """The layer of its direction; None for ``CONFIGURED`` and for random directions."""
        return None if self.origin is None else self.origin.layer

    @property
    def balance(self) -> float:
        """Which of its strengths is smaller, as ``least_squares_balanced`` takes it."""
        settings = self.settings
        own = settings.attn_strength, settings.mlp_strength
        attention, mlp = (settings.strength if strength is None else strength for strength in own)
        return attention / mlp - 1.0 if abs(attention) < abs(mlp) else 1.0 - mlp / attention


DOCUMENTED_DEFAULT = Candidate("the documented default", CONFIGURED, EditSettings())


def origin_of(direction: str) -> Origin | None:
    """Where a direction with this name is found; None if the name does not say."""
    match = re.fullmatch(_ORIGIN, direction)
    return None if match is None else _origin(match)


def _origin(match: re.Match[str]) -> Origin:
    return Origin(int(match["layer"]), Moment.ANSWER if match["thought"] is None else Moment.THOUGHT)


def least_squares(
    layer: int, strength: float, *, attention_alone: bool = False, moment: Moment = Moment.ANSWER
) -> Candidate:
    """Least squares on writers with the direction of a layer.

    Args:
        attention_alone: leave the writers of MLPs and experts alone.
        moment: the token before which the direction is found.
    """
    kind = _ATTENTION_ALONE if attention_alone else _LEAST_SQUARES
    settings = replace(METHODS["least-squares"].settings, strength=strength)
    if attention_alone:
        settings = replace(settings, mlp_strength=0.0)
    direction = Origin(layer, moment).name
    return Candidate(f"{kind}, {direction}, strength {strength:g}", direction, settings)


def least_squares_by_part(
    layer: int, attention: float, mlp: float, kernel: str, *, moment: Moment = Moment.ANSWER
) -> Candidate:
    """Least squares on writers with the direction of a layer, at strengths of their own for attention and for MLPs.

    Args:
        mlp: strength of MLPs and experts; one of both strengths is not 0.
        kernel: how the strengths fall off with the distance from the layer.
        moment: the token before which the direction is found.
    """
    larger = max(attention, mlp, key=abs)
    settings = replace(
        METHODS["least-squares"].settings,
        strength=larger,
        attn_strength=attention,
        mlp_strength=mlp,
        strength_kernel=kernel,
    )
    direction = Origin(layer, moment).name
    name = f"{_LEAST_SQUARES}, {direction}, attention {attention:g}, MLP {mlp:g}, {kernel}"
    return Candidate(name, direction, settings)


def least_squares_balanced(
    layer: int, strength: float, balance: float, kernel: str = CONSTANT, *, moment: Moment = Moment.ANSWER
) -> Candidate:
    """Least squares on writers with the direction of a layer, weaker on attention or on MLPs.

    Args:
        strength: the larger one of both strengths.
        balance: which one is smaller: 0 for none, 1 for MLPs and experts at 0, -1 for attention at 0; 0.25 leaves MLPs
            three quarters of the strength.
        kernel: how the strengths fall off with the distance from the layer.
        moment: the token before which the direction is found.
    """
    if kernel == CONSTANT and balance in (0.0, 1.0):
        return least_squares(layer, strength, attention_alone=balance == 1.0, moment=moment)
    attention, mlp = (strength * min(1.0, 1.0 + part) for part in (balance, -balance))
    return least_squares_by_part(layer, attention, mlp, kernel, moment=moment)


def orthogonal_on_writers(layer: int, *, moment: Moment = Moment.ANSWER) -> Candidate:
    """Directional ablation of writers with the direction of a layer, norms preserved."""
    settings = replace(DOCUMENTED_DEFAULT.settings, targets=("writers",))
    direction = Origin(layer, moment).name
    return Candidate(f"{_WRITERS}, {direction}", direction, settings)


def candidate_named(name: str) -> Candidate:
    """The candidate with this name.

    Raises:
        UsageError: no candidate has such a name.
    """
    if name == DOCUMENTED_DEFAULT.name:
        return DOCUMENTED_DEFAULT
    match = _NAME.fullmatch(name)
    if match is not None:
        origin, strength = _origin(match), _strength(match["strength"])
        if match["kind"] == _WRITERS and match["strength"] is None:
            return orthogonal_on_writers(origin.layer, moment=origin.moment)
        if match["kind"] != _WRITERS and strength is not None:
            alone = match["kind"] == _ATTENTION_ALONE
            return least_squares(origin.layer, strength, attention_alone=alone, moment=origin.moment)
    match = _BY_PART.fullmatch(name)
    if match is not None:
        attention, mlp = (_finite(match[part]) for part in ("attention", "mlp"))
        if attention is not None and mlp is not None and (attention or mlp):
            origin = _origin(match)
            return least_squares_by_part(origin.layer, attention, mlp, match["kernel"], moment=origin.moment)
    forms = (
        DOCUMENTED_DEFAULT.name,
        *(f"{kind}, {_LAYER}N, strength S" for kind in (_LEAST_SQUARES, _ATTENTION_ALONE)),
        f"{_LEAST_SQUARES}, {_LAYER}N, attention A, MLP M, KERNEL",
        f"{_WRITERS}, {_LAYER}N",
        f"for a model that thinks also {_LAYER}N{_AT_THOUGHT}",
    )
    raise UsageError(f"--pick {name!r} is not an edit that run tries", f"one of: {'; '.join(forms)}")


def _strength(text: str | None) -> float | None:
    """A finite strength other than 0; None for any other text."""
    return _finite(text or "") or None


def _finite(text: str) -> float | None:
    """A finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

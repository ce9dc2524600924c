"""Settings of the computation of a refusal direction.

``--help`` reads the defaults, so this module imports torch only to check settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.errors import UsageError

MAX_DIRECTIONS = 3  # joint directions


@dataclass(frozen=True)
class DirectionSettings:
    """The method, the candidate layers and the token position of a refusal direction.

    Attributes:
        method: a key of ``registry.METHODS``.
        layer_fracs: candidate layers as fractions of the depth; the layer with the largest gap between the harmful and
            the harmless mean is used.
        num_directions: 1; or 2 or 3, which are singular vectors of one layer's activations.
        per_layer: compute one direction for each layer, instead of one for all layers.
        position: token position, counted from the end of the templated prompt (-1: the last).

    Raises:
        UsageError: a value is unknown or out of range, or two of them exclude each other.
    """

    method: str = "difference-of-means"
    layer_fracs: tuple[float, ...] = (0.4, 0.5, 0.6)
    num_directions: int = 1
    per_layer: bool = False
    position: int = -1

    def __post_init__(self) -> None:
        from ollama_forge.directions.registry import method
        from ollama_forge.directions.selection import layer_of_fraction

        method(self.method)
        if not self.layer_fracs:
            raise UsageError("no layer fraction is given", "for example --layer-fracs 0.4,0.5,0.6")
        for fraction in self.layer_fracs:
            layer_of_fraction(fraction, 1)
        if self.position >= 0:
            raise UsageError(
                f"--position {self.position} is not below 0", "positions count from the end: -1 is the last token"
            )
        if not 1 <= self.num_directions <= MAX_DIRECTIONS:
            raise UsageError(f"--num-directions {self.num_directions} is not 1, 2 or 3", "one is the usual choice")
        if self.num_directions > 1 and (self.per_layer or self.method != DirectionSettings.method):
            raise UsageError("several directions come from one layer's singular vectors", "leave out the other option")

    def layers(self, n_layers: int) -> list[int]:
        """The layers whose statistics the computation needs."""
        from ollama_forge.directions.selection import layer_of_fraction

        if self.per_layer:
            return list(range(n_layers))
        return sorted({layer_of_fraction(fraction, n_layers) for fraction in self.layer_fracs})

"""Settings of an edit: which matrices it changes, and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.errors import ForgeError, UsageError

TARGET_SETS: dict[str, frozenset[Role]] = {
    "attention": frozenset({Role.Q, Role.K, Role.V, Role.QKV, Role.MIXER, Role.O}),
    "writers": frozenset({Role.O, Role.DOWN}),
    "mlp": frozenset({Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN}),
    "embedding": frozenset({Role.EMBEDDING, Role.POSITION}),
}
KERNELS = ("constant", "linear-peak", "gaussian")
MLP_ROLES = frozenset({Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN})


@dataclass(frozen=True)
class EditSettings:
    """Which matrices an edit changes, how strongly, and under which norm rule.

    These defaults are the documented default edit; ``registry.METHODS`` has the defaults of each method.

    Attributes:
        factors: name of the edit method (see ``registry.py``).
        targets: names of target sets; the edit changes the matrices of all of them.
        strength: 1 removes the direction, between 0 and 1 weakens it, above 1 overshoots. Below 0, orthogonal edits
            amplify the component along the direction, and least squares strengthens refusal.
        attn_strength, mlp_strength: strengths of attention and MLP matrices; None for ``strength``, 0 to skip them.
        skip_begin_layers, skip_end_layers: number of first and last decoder layers that are not edited.
        norm_preserving: scale a writer's columns and a reader's rows back to their norms before the edit.
        strength_kernel: how the strength falls off with the distance from the direction's layer.

    Raises:
        UsageError: a value is unknown or out of range.
    """

    factors: str = "orthogonal"
    targets: tuple[str, ...] = ("attention",)
    strength: float = 1.0
    attn_strength: float | None = None
    mlp_strength: float | None = None
    skip_begin_layers: int = 1
    skip_end_layers: int = 1
    norm_preserving: bool = True
    strength_kernel: str = "constant"

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGET_SETS]
        if unknown or not self.targets:
            raise UsageError(f"unknown target set {', '.join(unknown) or '(none)'}", f"use {', '.join(TARGET_SETS)}")
        if self.strength_kernel not in KERNELS:
            raise UsageError(f"unknown strength kernel {self.strength_kernel!r}", f"use one of {', '.join(KERNELS)}")
        if min(self.skip_begin_layers, self.skip_end_layers) < 0:
            raise UsageError("a number of layers to skip cannot be negative", "use 0 to skip none")
        for value in (self.strength, self.attn_strength, self.mlp_strength):
            if value is not None and not math.isfinite(value):
                raise UsageError("a strength must be a finite number", "use 1 to remove the direction")

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset[Role]().union(*(TARGET_SETS[name] for name in self.targets))

    @property
    def strengthens(self) -> bool:
        """Whether the edit is meant to strengthen refusal: a strength is negative."""
        return min(self.strength, self.attn_strength or 0.0, self.mlp_strength or 0.0) < 0

    @property
    def without_strengths(self) -> EditSettings:
        """The settings with all strengths set to 1; fitted factors depend on these alone."""
        return replace(self, strength=1.0, attn_strength=None, mlp_strength=None, strength_kernel="constant")

    def reason_to_skip(self, matrix: Matrix, n_layers: int) -> str | None:
        """Why a matrix is not edited; None if it is."""
        if matrix.role not in self.roles:
            return f"role {matrix.role.value} is not in targets {'+'.join(self.targets)}"
        if matrix.layer is not None and self._own_strength(matrix) == 0:
            return "its strength is 0"
        if matrix.layer is not None and matrix.layer < self.skip_begin_layers:
            return "first layers are skipped"
        if matrix.layer is not None and matrix.layer >= n_layers - self.skip_end_layers:
            return "last layers are skipped"
        return f"not proven: {matrix.unproven}" if matrix.unproven else None

    @staticmethod
    def selects_nothing(n_layers: int) -> ForgeError:
        """The error that no matrix of a model is edited."""
        return ForgeError(
            f"these settings leave none of the model's {n_layers} layers to edit",
            "lower --skip-begin-layers and --skip-end-layers, or widen --targets",
        )

    def strength_of(self, matrix: Matrix, n_layers: int, peak: float | None) -> float:
        """The strength for one matrix.

        Args:
            peak: the layer at which the kernel peaks; None for the middle of the edited layers.
        """
        base = self.strength
        if matrix.layer is None:
            return base
        override = self._own_strength(matrix)
        base = base if override is None else override
        if self.strength_kernel == "constant":
            return base
        first, last = self.skip_begin_layers, n_layers - 1 - self.skip_end_layers
        centre = (first + last) / 2 if peak is None else min(max(peak, first), last)
        distance = abs(matrix.layer - centre)
        if self.strength_kernel == "linear-peak":
            reach = max(centre - first, last - centre) + 1
            return base * (1 - distance / reach)
        width = max((last - first + 1) / 4, 1.0)
        return base * math.exp(-0.5 * (distance / width) ** 2)

    def _own_strength(self, matrix: Matrix) -> float | None:
        """The strength of attention or of the MLP; None if it is the common one."""
        return self.mlp_strength if matrix.role in MLP_ROLES else self.attn_strength

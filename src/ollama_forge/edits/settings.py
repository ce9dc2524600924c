"""What an edit touches and how strongly, as one frozen record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.errors import UsageError

TARGET_SETS: dict[str, frozenset[Role]] = {
    "attention": frozenset({Role.Q, Role.K, Role.V, Role.QKV, Role.O}),
    "writers": frozenset({Role.O, Role.DOWN}),
    "mlp": frozenset({Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN}),
    "embedding": frozenset({Role.EMBEDDING}),
}
KERNELS = ("constant", "linear-peak", "gaussian")
_MLP_ROLES = frozenset({Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN})


@dataclass(frozen=True)
class EditSettings:
    """Which matrices, how strongly, with which norm rule.

    Attributes:
        factors: name of the method that turns a direction into factors (see ``registry.py``).
        targets: names of target sets; their union is edited.
        strength: 1 removes the direction, (0, 1) weakens it, above 1 overshoots, below 0 strengthens refusal.
        attn_strength, mlp_strength: the same for attention's and the MLP's matrices alone.
        skip_begin_layers, skip_end_layers: decoder layers left alone at either end.
        norm_preserving: rescale a writer's columns, a reader's rows, to their norms of before.
        strength_kernel: how strength falls off over depth from the direction's layer.
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
            raise UsageError(f"unknown target set {', '.join(unknown) or '(none)'}", f"one of {', '.join(TARGET_SETS)}")
        if self.strength_kernel not in KERNELS:
            raise UsageError(f"unknown strength kernel {self.strength_kernel!r}", f"one of {', '.join(KERNELS)}")
        if min(self.skip_begin_layers, self.skip_end_layers) < 0:
            raise UsageError("a number of layers to skip cannot be negative", "0 skips none")
        for value in (self.strength, self.attn_strength, self.mlp_strength):
            if value is not None and not math.isfinite(value):
                raise UsageError("a strength must be a finite number", "1 removes the direction")

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset[Role]().union(*(TARGET_SETS[name] for name in self.targets))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}

    def reason_to_skip(self, matrix: Matrix, n_layers: int) -> str | None:
        """Why a matrix is left alone, or None where it is edited."""
        if matrix.role not in self.roles:
            return f"role {matrix.role.value} is not in targets {'+'.join(self.targets)}"
        if matrix.layer is None:
            return None
        if matrix.layer < self.skip_begin_layers:
            return "first layers are skipped"
        return "last layers are skipped" if matrix.layer >= n_layers - self.skip_end_layers else None

    def strength_of(self, matrix: Matrix, n_layers: int, peak: float | None) -> float:
        """The strength for one matrix; ``peak`` is the direction's layer (None: the middle of the edited ones)."""
        base = self.strength
        if matrix.layer is None:
            return base
        own = self.mlp_strength if matrix.role in _MLP_ROLES else self.attn_strength
        base = base if own is None else own
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

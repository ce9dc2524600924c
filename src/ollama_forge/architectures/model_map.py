"""The matrices of a model by role and layer, and the norms in front of and behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    Q, K, V, QKV, O = "q", "k", "v", "qkv", "o"  # noqa: E741
    GATE, UP, GATE_UP, DOWN, ROUTER = "gate", "up", "gate_up", "down", "router"
    EMBEDDING, UNEMBEDDING = "embedding", "unembedding"


@dataclass(frozen=True)
class Norm:
    """A norm by its tensors' names: ``gain = weight + offset``, ``centred`` for LayerNorm."""

    weight: str
    bias: str | None
    offset: float
    centred: bool


@dataclass(frozen=True)
class Matrix:
    """One matrix (or one stack of experts' matrices) of a checkpoint.

    Attributes:
        tensor: name on disk, or that it will have once decoded (MXFP4).
        mxfp4: its parts on disk are ``<tensor>_blocks`` and ``<tensor>_scales``.
        shape: of ``tensor``: ``[out, in]``, transposed where ``transposed``, with a first axis of ``experts``.
        module: path in the loaded model, without the root that wrappers add.
        reads: the norm in front of it, for a reader; None for the bare stream.
        post_norm: the norm between a writer's output and the residual stream, or None.
    """

    tensor: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    module: str
    writes: bool
    bias: str | None = None
    reads: Norm | None = None
    post_norm: Norm | None = None
    transposed: bool = False
    experts: bool = False
    mxfp4: bool = False

    @property
    def in_features(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[-2]


@dataclass(frozen=True)
class ModelMap:
    """A checkpoint's matrices in layer order, and the sizes and roots that go with them.

    Attributes:
        tied: no unembedding is stored, for it is the embedding.
        unused: tensors that are known and copied, but that the text model may do without.
        copies: name of a matrix that is stored a second time -> name of the matrix it repeats. The model ties the two,
            so an edit of the one is made to the other as well.
    """

    model_type: str
    n_layers: int
    d_model: int
    matrices: tuple[Matrix, ...]
    module_roots: tuple[str, ...]
    layer_module: str
    tied: bool
    unused: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding: ids from this number on cannot be embedded."""
        return self._embeddings[0].shape[0]

    @property
    def learned_positions(self) -> int | None:
        """Rows of the embedding of positions, where positions are learned: no prompt can be longer."""
        return self._embeddings[1].shape[0] if len(self._embeddings) > 1 else None

    @property
    def _embeddings(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.role is Role.EMBEDDING]

    @property
    def writers(self) -> tuple[Matrix, ...]:
        """The residual writers of the layers (the embedding is a set of its own)."""
        return tuple(matrix for matrix in self.matrices if matrix.writes and matrix.layer is not None)

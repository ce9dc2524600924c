"""The matrices of a model by role and layer, and the norms before and after them."""

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
    """A norm layer.

    Attributes:
        weight, bias: names of its tensors.
        offset: the gain is the stored weight plus this (Gemma stores gain - 1).
        centred: LayerNorm, which subtracts the mean; False for RMSNorm.
    """

    weight: str
    bias: str | None
    offset: float
    centred: bool


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint, or the stacked matrices of all experts of a layer.

    Attributes:
        tensor: its name on disk; for MXFP4 its name after decoding.
        layer: number of the decoder layer; None for embeddings and heads.
        shape: ``[out, in]``, or ``[in, out]`` if ``transposed``; with a leading expert axis if ``experts``.
        module: path of its module in the loaded model, without the root in ``ModelMap.module_roots``.
        writes: whether its output is added to the residual stream; otherwise it reads the stream.
        bias: name of the bias, or None.
        reads: for a reader, the norm of its input; None if it reads the residual stream without a norm.
        post_norm: for a writer, the norm between its output and the residual stream, or None.
        mxfp4: stored as ``<tensor>_blocks`` and ``<tensor>_scales``.
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
    """The matrices of a checkpoint in layer order, and the sizes of the model.

    Attributes:
        module_roots: possible prefixes of module paths in the loaded model; the first that exists applies.
        layer_module: format string for the path of a decoder layer, relative to the root.
        tied: no unembedding is stored, because the model uses the embedding.
        unused: tensors that are copied without a role; the loaded text model may lack them.
        copies: maps the name of a tied matrix that is stored twice to the name of the original. An edit of the original
            is also written to the copy.
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
        """Number of rows of the token embedding: token ids must be less than this."""
        return self._embeddings[0].shape[0]

    @property
    def learned_positions(self) -> int | None:
        """Number of rows of the position embedding, the maximum prompt length; None without learned positions."""
        return self._embeddings[1].shape[0] if len(self._embeddings) > 1 else None

    @property
    def _embeddings(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.role is Role.EMBEDDING]

    @property
    def writers(self) -> tuple[Matrix, ...]:
        """The residual writers of the decoder layers, without the embeddings."""
        return tuple(matrix for matrix in self.matrices if matrix.writes and matrix.layer is not None)

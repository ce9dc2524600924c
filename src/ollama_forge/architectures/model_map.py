"""The matrices of a model by role and layer, and the norms before and after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any


class _RangeAsList:
    """Pydantic's schema of a range, made when it is asked for: importing pydantic would slow every command's start."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        as_list = core_schema.plain_serializer_function_ser_schema(lambda r: [r.start, r.stop, r.step])
        return core_schema.no_info_plain_validator_function(_to_range, serialization=as_list)


def _to_range(value: Any) -> range:
    return value if isinstance(value, range) else range(*value)


Indices = Annotated[range, _RangeAsList]  # indices along an axis; [start, stop, step] in JSON


class Role(StrEnum):
    """What a matrix is for. ``MIXER``: an input of a token mixer that is not attention's q, k or v (gates, decays).

    ``QKV`` and ``GATE_UP`` are several of them in one matrix, ``ROUTER`` also weighs a shared expert, and ``POSITION``
    is a learned position embedding.
    """

    Q, K, V, QKV, O, MIXER = "q", "k", "v", "qkv", "o", "mixer"  # noqa: E741
    GATE, UP, GATE_UP, DOWN, ROUTER = "gate", "up", "gate_up", "down", "router"
    EMBEDDING, POSITION, UNEMBEDDING = "embedding", "position", "unembedding"


@dataclass(frozen=True)
class Norm:
    """A norm between a matrix and the residual stream, or a bare gain: ``g * P x / |x| + b``.

    Attributes:
        weight: name of the tensor that holds the gain ``g`` up to a constant factor; None if the gain is 1.
        bias: name of the tensor of the bias, or None.
        offset: the gain is the stored weight plus this (Gemma stores gain - 1).
        centred: LayerNorm, which subtracts the mean (``P``); False for RMSNorm.
        module: path of the module in the loaded model; "" for a gain without a norm.
        column: the gain is this column of the last axis of ``weight`` ``[d, ..., n]``, as a convolution stores it; None
            for a vector.
        parameter: name of the gain in the module.
    """

    weight: str | None
    bias: str | None
    offset: float
    centred: bool
    module: str
    column: int | None = None
    parameter: str = "weight"


@dataclass(frozen=True)
class Place:
    """Where a matrix, or a part of its rows, is in the loaded model.

    Attributes:
        module: path of the module that owns the parameter.
        parameter: the parameter's name in the module.
        bias: name of the bias in the module, or None.
        transposed: the parameter is ``[..., in, out]``.
        expert: index on the parameter's first axis, if the matrix is one tensor of a stack on disk; None for all.
        rows: the parameter's rows (on its out axis) that the matrix fills; None for all.
        stored_rows: the matrix's own rows that are here; None for all.
        linear: the module computes ``W x + b`` of its first argument, or looks up rows (times a constant), with the
            whole parameter.
    """

    module: str
    parameter: str = "weight"
    bias: str | None = None
    transposed: bool = False
    expert: int | None = None
    rows: Indices | None = None
    stored_rows: Indices | None = None
    linear: bool = True


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint, the stacked matrices of all experts of a layer, or a vector that writes.

    Attributes:
        tensor: its name on disk; for a packed tensor (FP8, MXFP4) its name after decoding.
        layer: number of the decoder layer; None for embeddings and heads.
        shape: ``[out, in]``, or ``[in, out]`` if ``transposed``; with a leading expert axis if ``experts``; ``[d]`` for
            a vector that is added to the residual stream.
        places: where it is in the loaded model; more than one if a tensor on disk is split in memory.
        writes: whether its output is added to the residual stream; otherwise it reads the stream.
        bias: name of the bias, or None.
        reads: for a reader, the norm of its input; None if it reads the residual stream without a norm.
        stream_at: for a reader whose input holds the stream beside other vectors, the first channels of its copies.
        post_norms: for a writer, the norms between its output and the residual stream; if there are several, the
            stream receives the output through each of them.
        expert: number of the expert, if each one is a tensor of its own; None otherwise.
        unproven: why the certificate does not prove it, in one sentence; such a matrix is not edited. Empty if it is
            proven.
    """

    tensor: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    writes: bool
    bias: str | None = None
    reads: Norm | None = None
    stream_at: tuple[int, ...] = (0,)
    post_norms: tuple[Norm, ...] = ()
    transposed: bool = False
    experts: bool = False
    expert: int | None = None
    unproven: str = ""

    @property
    def place(self) -> Place:
        """The first of its places."""
        return self.places[0]

    @property
    def tensor_of_experts(self) -> str:
        """Its tensor's name with ``N`` for the number of its expert, so that all experts of a layer have the same."""
        return without_number(self.tensor, self.expert)

    @property
    def rows_are_written(self) -> bool:
        """Whether its rows are themselves vectors of the residual stream: an embedding, or one vector."""
        return self.role in (Role.EMBEDDING, Role.POSITION) or len(self.shape) == 1

    @property
    def is_expert(self) -> bool:
        """Whether it is an expert's matrix or a stack of experts' matrices, so that a router chooses its inputs."""
        return self.experts or self.expert is not None

    @property
    def in_features(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else (self.shape[-2] if len(self.shape) > 1 else 1)


def without_number(name: str, expert: int | None) -> str:
    """A tensor's name with ``N`` for the number of its expert, the last such number in the name; None: as it is."""
    parts = name.split(".")
    places = [index for index, part in enumerate(parts) if expert is not None and part == str(expert)]
    if places:
        parts[places[-1]] = "N"
    return ".".join(parts)


@dataclass(frozen=True)
class ModelMap:
    """The matrices of a checkpoint in layer order, and the sizes of the model.

    Attributes:
        layers: path of each decoder layer's module in the loaded model.
        vocabulary: number of rows of the table that tokens are looked up in: token ids must be less than this.
        tied: no unembedding is stored, because the model uses the embedding.
        unused: tensors that are copied without a role; the loaded text model may lack them.
        copies: maps the name of a tied matrix that is stored twice to the name of the original. An edit of the original
            is also written to the copy.
        gaps: what reads or writes the residual stream, or might, but is in no matrix; a sentence each.
        alike: for each layer, the paths of the twin's blocks that stand for it.
        text_alone: the model is loaded as the causal LM of its type, because the wrapper that its config names does
            not run on text; the wrapper's towers are among ``unused``.
    """

    model_type: str
    d_model: int
    matrices: tuple[Matrix, ...]
    layers: tuple[str, ...]
    vocabulary: int
    tied: bool
    unused: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)
    gaps: tuple[str, ...] = ()
    alike: tuple[tuple[str, ...], ...] = ()
    text_alone: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def learned_positions(self) -> int | None:
        """Number of rows of the position embedding, the maximum prompt length; None without learned positions."""
        return next((matrix.shape[0] for matrix in self.matrices if matrix.role is Role.POSITION), None)

    @property
    def writers(self) -> tuple[Matrix, ...]:
        """The residual writers of the decoder layers, without the embeddings."""
        return tuple(matrix for matrix in self.matrices if matrix.writes and matrix.layer is not None)

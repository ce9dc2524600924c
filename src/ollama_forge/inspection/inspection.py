"""What ``inspect`` finds out about a model: its tier, its matrices by layer and role, its sizes, and warnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ollama_forge.architectures.certificate.certificate import Certificate, Tier
from ollama_forge.edits.settings import EditSettings
from ollama_forge.inspection.loud_channels import LoudChannel
from ollama_forge.records import to_json


@dataclass(frozen=True)
class NormRow:
    """A norm, or a bare gain, between a matrix and the residual stream.

    Attributes:
        tensor: the tensor of its gain; None if the gain is 1.
        offset: the gain is the stored tensor plus this.
        centred: it subtracts the mean (LayerNorm).
        normalises: it is a norm; False for a bare gain.
    """

    tensor: str | None
    offset: float
    centred: bool
    normalises: bool


@dataclass(frozen=True)
class MatrixRow:
    """A matrix of one layer, or all experts' matrices of one kind in a layer.

    Attributes:
        role: its role, such as ``q`` or ``down``.
        layer: number of the decoder layer; None outside the layers.
        tensor: its name on disk; ``N`` stands for the number of the expert if each expert has a tensor of its own.
        shape: shape of the matrix as stored, of one expert if there are several.
        storage: storage type, such as ``BF16`` or ``MXFP4``.
        writes: it writes to the residual stream; otherwise it reads the stream.
        norms: the norms between it and the stream; empty if there is none.
        experts: number of experts; None for a matrix that is not an expert's.
        bias: the tensor of its bias, or None.
        strength: the strength at which the settings edit it; None if they do not.
        reason: why it is not edited; None if it is.
    """

    role: str
    layer: int | None
    tensor: str
    shape: tuple[int, ...]
    storage: str
    writes: bool
    norms: tuple[NormRow, ...]
    experts: int | None
    bias: str | None
    strength: float | None
    reason: str | None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; ``experts`` is the number of routed or other experts of a layer, 0 without experts."""

    d_model: int
    layers: int
    vocabulary: int
    experts: int
    parameters: int


@dataclass(frozen=True)
class UnusedTensors:
    """Tensors that are copied without a role: towers, multi-token prediction, buffers.

    Attributes:
        parameters: number of their values.
        groups: number of tensors by the first parts of their names.
    """

    parameters: int
    groups: dict[str, int]

    @property
    def count(self) -> int:
        return sum(self.groups.values())


@dataclass(frozen=True)
class Inspection:
    """A model, as an edit would find it.

    Attributes:
        model: the ``--model`` that was inspected.
        revision: its commit or hash; None if there is none.
        model_type: the architecture's name in config.json.
        tier: how much is proven.
        reasons: why the tier is not ``proven``.
        certificate: what was measured on the twin; None if the model was refused before.
        settings: the settings of the edit.
        sizes, tied, matrices, unused, loud: None or empty if the model was refused before its tensors were mapped.
        warnings: what to know before an edit.
    """

    model: str
    revision: str | None
    model_type: str
    tier: Tier
    reasons: tuple[str, ...]
    certificate: Certificate | None
    settings: EditSettings
    sizes: Sizes | None = None
    tied: bool | None = None
    matrices: tuple[MatrixRow, ...] = ()
    unused: UnusedTensors | None = None
    loud: tuple[LoudChannel, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``inspect --json`` prints."""
        values: dict[str, Any] = to_json(self)
        return values

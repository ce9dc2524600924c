"""What experiments on a twin find out about a model's class; names and indices are those of the twin.

``roles/`` makes a ``RoleFound`` of each parameter, ``parts/`` says its role, and ``names/`` finds its pieces on disk. A
``LearnedArchitecture`` holds all of it, and is cached; ``names/bind.py`` makes it the ``ModelMap`` of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ollama_forge.architectures.model_map import Indices, Role


@dataclass(frozen=True)
class NormFound:
    """A norm, or a bare gain, between a parameter and the residual stream.

    Attributes:
        module: path of the norm's module; "" for a gain without a norm.
        gain: name of the parameter whose values plus ``offset`` are the gain up to a factor; None if the gain is 1.
        offset: 0 or 1, found by measuring.
        column: the gain is this column of the parameter's last axis; None for a vector.
        bias: name of the parameter that the norm adds, or None.
        centred: whether the norm subtracts the mean.
    """

    module: str
    gain: str | None
    offset: float
    centred: bool
    bias: str | None = None
    column: int | None = None


@dataclass(frozen=True)
class RoleFound:
    """A parameter that reads the residual stream or writes to it.

    Attributes:
        parameter: its name in ``named_parameters`` of the twin; for tied ones the first name.
        module: path of the module that owns it.
        writes: whether it writes; otherwise it reads.
        axis: the parameter's axis along the residual stream: ``d`` values for a writer, its input for a reader.
        expert_axis: the axis that counts the experts of a stack, or None.
        block: number of the first block that uses it, in the order of their first calls; None outside the blocks.
        norms: for a reader, the norm of its input, if there is one; for a writer, the ways from its output to the
            stream, one norm or gain each; empty if the output is added as it is.
        stream_at: for a reader, the first channels of the copies of the stream in its input.
        linear: whether its module computes ``W x + b`` of its first argument (or looks up rows, times a constant).
        bias: name of the parameter that its module adds to its output, or None.
        role: what it is for (``parts/``).
        mixes: whether it belongs to the part of the block that mixes tokens (attention); False for the MLP part.
        rows: some rows of a reader of several roles, numbered along its out axis, and what each is for (``parts/``).
    """

    parameter: str
    module: str
    writes: bool
    axis: int
    expert_axis: int | None = None
    block: int | None = None
    norms: tuple[NormFound, ...] = ()
    stream_at: tuple[int, ...] = (0,)
    linear: bool = False
    bias: str | None = None
    role: Role | None = None
    mixes: bool = False
    rows: tuple[tuple[int, Role], ...] = ()


@dataclass(frozen=True)
class Gap:
    """What the experiments could not find out.

    Attributes:
        module: path of the module in the twin; "" for the region before the first block.
        about: what cannot be trusted: ``"writers"``, ``"readers"``, or the ``"stream"`` itself (it is not carried over
            from block to block). ``"idle"`` is a module of the blocks that never ran on text.
        reason: why, as a sentence without its subject, the module.
    """

    module: str
    about: Literal["writers", "readers", "stream", "idle"]
    reason: str

    def __str__(self) -> str:
        return f"{self.module or 'the input of the first block'}: {self.reason}"


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and the box of a stored tensor that holds the same values.

    ``memory``, ``stored`` and ``axes`` are empty if the tensor holds values of the parameter in an order that no few
    boxes express.

    Attributes:
        tensor: name of the stored tensor.
        shape: shape of the stored tensor.
        memory: for each axis of the parameter, the indices of the box.
        stored: for each axis of the stored tensor, the indices of the box.
        axes: for each axis of the parameter, the axis of the stored tensor; None if the stored tensor lacks it (one
            index of the parameter's axis).
    """

    tensor: str
    shape: tuple[int, ...]
    memory: tuple[Indices, ...]
    stored: tuple[Indices, ...]
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the twin and all its pieces on disk; none if ``save_pretrained`` does not write it."""

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LearnedArchitecture:
    """The result of all experiments on a twin.

    Attributes:
        d_model: width of the twin's residual stream.
        blocks: paths of the twin's blocks, in the order of their first calls.
        roles: the parameters that read or write the stream, with their roles.
        parameters: every parameter and buffer of the twin on disk.
        gaps: what could not be found out.
        text_alone: the wrapper that the config names does not run on text; all else is about its type's causal LM.
    """

    d_model: int
    blocks: tuple[str, ...]
    roles: tuple[RoleFound, ...]
    parameters: tuple[StoredParameter, ...]
    gaps: tuple[Gap, ...]
    text_alone: bool = False

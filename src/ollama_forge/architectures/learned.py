"""What experiments on a twin find out about a model's class; names and indices are those of the twin.

``roles.py`` fills a ``RoleFound`` for each parameter, ``parts.py`` its role, and ``names.py`` its pieces on disk. A
``LearnedArchitecture`` holds all of it, and is cached; ``bind.py`` turns it into the ``ModelMap`` of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        linear: whether its module computes ``W x + b`` of its first argument (or looks up rows of an embedding).
        bias: name of the parameter that its module adds to its output, or None.
        role: what it is for (``parts.py``).
        mixes: whether it belongs to the part of the block that mixes tokens (attention); False for the MLP part.
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


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and the box of a stored tensor that holds the same values.

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
        model_class: name of the transformers class that loads the checkpoint.
        d_model: width of the twin's residual stream.
        blocks: paths of the twin's blocks, in the order of their first calls.
        roles: the parameters that read or write the stream, with their roles.
        head: name of the unembedding's parameter, or None if the class has none.
        tied: whether the head is the embedding.
        parameters: every parameter and buffer of the twin on disk.
        ignored: regular expressions of stored names that the class skips on loading.
        gaps: what could not be found out, one sentence each (module and reason).
    """

    model_class: str
    d_model: int
    blocks: tuple[str, ...]
    roles: tuple[RoleFound, ...]
    head: str | None
    tied: bool
    parameters: tuple[StoredParameter, ...]
    ignored: tuple[str, ...]
    gaps: tuple[str, ...]

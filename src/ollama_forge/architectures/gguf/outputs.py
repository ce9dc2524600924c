"""The tensors that llama.cpp's converter writes for a config, and how they follow when a size changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from ollama_forge.architectures.gguf.hub_tensors import Shapes
from ollama_forge.checkpoints.gguf.layout import Part, Steps
from ollama_forge.errors import ForgeError

USE_RELEASE = "use the model's Hugging Face release instead of the GGUF file"


@dataclass(frozen=True)
class Output:
    """A tensor that the converter writes.

    Attributes:
        shape: its shape, in row-major order.
        parts: the parts that fill it; none if its values come from the config.
        computed: why no parts are known although its values come from tensors; empty if parts are known.
        vocabulary: the axis along which the entries of the vocabulary are; None without one.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    computed: str = ""
    vocabulary: int | None = None


@dataclass(frozen=True)
class LearnedLayout:
    """What the converter writes for a config.

    Attributes:
        outputs: by the names of GGUF tensors.
        tied: the Hugging Face tensors that a checkpoint may lack, because they share their values with another.
    """

    outputs: Mapping[str, Output]
    tied: tuple[str, ...]


def resized(output: Output, shapes: Shapes) -> Output:
    """The output if its Hugging Face tensors have other ``shapes``.

    Raises:
        ForgeError: it does not follow from the output that is known.
    """
    shape, parts = list(output.shape), []
    for part in output.parts:
        for axis, (before, after) in enumerate(zip(part.shape, shapes[part.tensor], strict=True)):
            if before != after:
                part = _resized_part(part, axis, after, shape)
        parts.append(part)
    return replace(output, shape=tuple(shape), parts=tuple(parts))


def _resized_part(part: Part, axis: int, size: int, shape: list[int]) -> Part:
    """A part of a tensor with another size along an axis; ``shape``, that of the output, is changed with it.

    The slowest digit of the index along that axis, and no other, counts more or fewer values.
    """
    before = part.shape[axis]
    slowest = [
        (step.axis, at)
        for step in part.steps[axis]
        for at, (count, stride) in enumerate(zip(step.counts, step.strides, strict=True))
        if count * stride == before and count * size % before == 0
    ]
    if len(slowest) != 1 or (slowest[0][0] == 0 and part.count != shape[0]):
        raise ForgeError(f"how the GGUF file stores {part.tensor} does not follow from a smaller model", USE_RELEASE)
    on, digit = slowest[0]

    def counted(step: Steps) -> Steps:
        counts = list(step.counts)
        counts[digit] = counts[digit] * size // before
        return replace(step, counts=tuple(counts))

    shape[on] = shape[on] * size // before
    return replace(
        part,
        shape=(*part.shape[:axis], size, *part.shape[axis + 1 :]),
        steps=tuple(tuple(counted(step) if step.axis == on else step for step in own) for own in part.steps),
        count=shape[0] if on == 0 else part.count,
    )


def check_complete(outputs: Mapping[str, Output]) -> None:
    """Check that the parts of each Hugging Face tensor hold each of its elements once.

    Raises:
        ForgeError: they do not.
    """
    of_tensor: dict[str, list[Part]] = {}
    for output in outputs.values():
        for part in output.parts:
            of_tensor.setdefault(part.tensor, []).append(replace(part, tensor="", start=0))
    for name, parts in of_tensor.items():
        if not _is_partition(tuple(parts)):
            raise ForgeError(f"a GGUF file of this model does not hold each element of {name} once", USE_RELEASE)


@cache
def _is_partition(parts: tuple[Part, ...]) -> bool:
    """Whether parts share out the indices along one axis of their tensor, and have all along the others."""
    shape = parts[0].shape
    indices = [[_indices(part, axis) for axis in range(len(shape))] for part in parts]
    if sum(math.prod(map(len, of_part)) for of_part in indices) != math.prod(shape):
        return False
    shared = [axis for axis, size in enumerate(shape) if any(len(of_part[axis]) < size for of_part in indices)]
    if len(shared) > 1 or (not shared and len(parts) > 1):
        return False
    return all(
        sorted(index for of_part in (indices if axis in shared else indices[:1]) for index in of_part[axis])
        == list(range(size))
        for axis, size in enumerate(shape)
    )


def _indices(part: Part, axis: int) -> list[int]:
    found = [part.first[axis]]
    for step in part.steps[axis]:
        along = step.indices().tolist()
        found = [index + more for index in found for more in along]
    return found

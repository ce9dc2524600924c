"""The layout of one GGUF file, from what the converter writes for the model."""

from __future__ import annotations

import re
from dataclasses import replace

from gguf import MODEL_TENSOR, TENSOR_NAMES

from ollama_forge.architectures.gguf.outputs import USE_RELEASE, LearnedLayout, Output, resized
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part
from ollama_forge.errors import ForgeError

_BLOCK = re.compile(r"blk\.(\d+)\.")
_OLD_EXPERT = re.compile(r"\.ffn_(gate|up|down)\.\d+\.weight$")
_OF_CONFIG = {
    f"{TENSOR_NAMES[kind]}.weight"
    for kind in (MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT)
}  # rotary frequencies come from the config, and a config made from the metadata may lack them


def file_layout(learned: LearnedLayout, file: Gguf) -> GgufLayout:
    """The layout of a file.

    The vocabulary is the file's own, and a head that is tied may be absent or stored. Tensors of layers that predict
    further tokens have no parts: transformers does not load them.

    Raises:
        ForgeError: the file is not one that the converter writes for this model, or the values of one of its tensors
            are computed.
    """
    depth = 1 + max((int(found[1]) for name in learned.outputs if (found := _BLOCK.match(name))), default=-1)
    parts: dict[str, tuple[Part, ...]] = {}
    for tensor in file.tensors:
        output = learned.outputs.get(tensor.name)
        if output is not None:
            parts[tensor.name] = _parts_in(output, tensor.shape[::-1], file, tensor.name)
        elif tensor.name in _OF_CONFIG or _predicts_further(file, tensor.name, depth):
            parts[tensor.name] = ()
        else:
            raise _foreign(file, f"it has a tensor {tensor.name}", tensor.name)
    for name, output in learned.outputs.items():
        if name not in parts and (output.computed or any(part.tensor not in learned.tied for part in output.parts)):
            raise _foreign(file, f"it has no tensor {name}")
    return GgufLayout(parts, {part.tensor: part.shape for held in parts.values() for part in held})


def _predicts_further(file: Gguf, name: str, depth: int) -> bool:
    block = _BLOCK.match(name)
    return bool(block and int(block[1]) >= depth and file.get(f"{file.architecture}.nextn_predict_layers", 0))


def _parts_in(output: Output, shape: tuple[int, ...], file: Gguf, name: str) -> tuple[Part, ...]:
    """The parts of a tensor of the file, whose shape may differ in the vocabulary and in leading axes of size 1."""
    if output.computed:
        raise ForgeError(f"{name} of {file.path} holds no Hugging Face tensor as it is: {output.computed}", USE_RELEASE)
    left_out = len(output.shape) - len(shape)  # llama.cpp drops leading axes of size 1 when it quantises
    whole = (1,) * left_out + shape
    axis = output.vocabulary
    if axis is not None and len(whole) == len(output.shape) and whole[axis] != output.shape[axis]:
        (part,) = output.parts
        of_tensor = next(at for at, steps in enumerate(part.steps) if any(step.axis == axis for step in steps))
        sizes = (*part.shape[:of_tensor], whole[axis], *part.shape[of_tensor + 1 :])
        output = resized(output, {part.tensor: sizes})
    if whole != output.shape:
        expected = "x".join(map(str, output.shape))
        raise _foreign(file, f"{name} has the shape {'x'.join(map(str, shape))} instead of {expected}", name)
    if left_out <= 0:
        return output.parts
    return tuple(
        replace(
            part,
            count=shape[0],
            steps=tuple(tuple(replace(step, axis=step.axis - left_out) for step in own) for own in part.steps),
        )
        for part in output.parts
    )


def _foreign(file: Gguf, what: str, name: str = "") -> ForgeError:
    if _OLD_EXPERT.search(name):
        return ForgeError(
            f"{file.path} was converted by an old llama.cpp, which stored each expert apart ({name})",
            "convert it again, or download a newer file",
        )
    return ForgeError(
        f"{file.path} is not a file of this model: {what}",
        "convert it again with a current llama.cpp, or give the model's Hugging Face release",
    )

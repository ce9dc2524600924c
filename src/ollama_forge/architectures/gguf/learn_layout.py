"""Learn from llama.cpp's converter where a GGUF file holds the elements of each Hugging Face tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gguf import MODEL_TENSOR, TENSOR_NAMES

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.gguf.hub_tensors import HubTensors, Shapes, hub_tensors
from ollama_forge.architectures.gguf.session import ConverterError, ConverterSession, converter_session
from ollama_forge.architectures.twin.shrink import Scale, shrink, text_path
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint, find_converter
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part, Steps
from ollama_forge.errors import ForgeError
from ollama_forge.records import from_json

_EXPERTS = 3  # that a model is asked about with: each more costs memory, and the others follow by their numbers
_BLOCK = re.compile(r"blk\.(\d+)\.")
_SEPARATE_EXPERT = re.compile(r"\.ffn_(gate|up|down)\.\d+\.weight$")
_NUMBER = re.compile(r"(\d+)")
_OF_CONFIG = {
    f"{TENSOR_NAMES[kind]}.weight"
    for kind in (MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT)
}  # what the converter computes from the config: a file's metadata do not tell whether it has them


@dataclass(frozen=True)
class Output:
    """A tensor that the converter writes.

    Attributes:
        shape: its shape, in row-major order.
        parts: the parts that fill it; none for a tensor that is made from the config.
        computed: why no parts are known; empty if they are.
        vocabulary: the axis of the entries of the vocabulary; None without one.
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


def layout_of(config: Mapping[str, Any], file: Gguf) -> GgufLayout:
    """The layout of a GGUF file.

    Args:
        config: the content of the model's config.json; ``vocab_size`` may differ from the file's.

    Raises:
        ForgeError: the converter is not installed, or does not know the model; the file is not one that it writes for
            this model; or a tensor of the file is not a rearrangement of Hugging Face tensors.
    """
    return _of_file(learned_layout(config), file)


def learned_layout(config: Mapping[str, Any]) -> LearnedLayout:
    """What the converter writes for a config, from the cache if it was learned before."""
    key = {**config, "converter": converter_fingerprint(find_converter(None))}
    return cached(LearnedLayout, ".layout.json", key, None, lambda: learn_layout(config))


def learn_layout(config: Mapping[str, Any]) -> LearnedLayout:
    """What the converter writes for a config, asked with few experts and a small vocabulary; see ``layout_of``."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    small_config = shrink(plain, Scale(1.0, experts=_EXPERTS), None)
    small, full = hub_tensors(small_config), hub_tensors(plain)
    with converter_session() as session:
        answer = _ask(session, small_config, small)
    small_shapes, full_shapes = {**small.stored, **small.tied}, {**full.stored, **full.tied}
    sizes = _vocabulary(small_config), _vocabulary(plain)
    outputs = {}
    for name, told in answer.items():
        output = from_json(Output, told)
        output = _with_all_experts(output, small_shapes, full_shapes)
        outputs[name] = _resized(_marked(output, full_shapes, *sizes), full_shapes)
    return LearnedLayout(outputs, tuple(full.tied))


def _ask(session: ConverterSession, config: Mapping[str, Any], tensors: HubTensors) -> dict[str, Any]:
    try:
        return dict(session.ask("places", config=config, shapes={**tensors.stored, **tensors.tied})["tensors"])
    except ConverterError:
        if not tensors.tied:
            raise
    return dict(session.ask("places", config=config, shapes=tensors.stored)["tensors"])  # it may reject a tied head


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    text = config
    for key in text_path(config):
        text = text[key]
    size = text.get("vocab_size")
    return size if isinstance(size, int) else None


def _with_all_experts(output: Output, small: Shapes, full: Shapes) -> Output:
    """Add the parts of the experts that the model has more of: their names and rows go on by number."""
    first, *others = output.parts or [None]
    if first is None or not others:
        return output
    pieces = [_NUMBER.split(part.tensor) for part in output.parts]
    places = {at for numbers in pieces for at, piece in enumerate(numbers) if piece != pieces[0][at]}
    if len(places) != 1:
        return output
    place = places.pop()

    def expert(number: int) -> Part:
        name = "".join([*pieces[0][:place], str(number), *pieces[0][place + 1 :]])
        return replace(first, tensor=name, start=number * first.count)

    if any(part != expert(number) for number, part in enumerate(output.parts)):
        return output
    count = len(output.parts)
    while expert(count).tensor in full and expert(count).tensor not in small:
        count += 1
    parts = tuple(map(expert, range(count)))
    return replace(output, shape=(count * first.count, *output.shape[1:]), parts=parts)


def _marked(output: Output, full: Shapes, small_size: int | None, size: int | None) -> Output:
    """Note which axis has the entries of the vocabulary."""
    if len(output.parts) != 1 or size is None:
        return output
    part = output.parts[0]
    for axis, (before, after) in enumerate(zip(part.shape, full[part.tensor], strict=True)):
        if (before, after) == (small_size, size) and [step.counts for step in part.steps[axis]] == [(before,)]:
            return replace(output, vocabulary=part.steps[axis][0].axis)
    return output


def _resized(output: Output, shapes: Shapes) -> Output:
    """The output of tensors that have other shapes.

    Raises:
        ForgeError: it does not follow from the one that is known.
    """
    shape = list(output.shape)
    parts = []
    for part in output.parts:
        resized = part
        for axis, (before, after) in enumerate(zip(part.shape, shapes[part.tensor], strict=True)):
            if before != after:
                resized, on, size = _resized_part(resized, axis, after, shape)
                shape[on] = size
        parts.append(resized)
    return replace(output, shape=tuple(shape), parts=tuple(parts))


def _resized_part(part: Part, axis: int, size: int, shape: list[int]) -> tuple[Part, int, int]:
    """A part of a tensor with another size along an axis; and the axis and size of the output that follow it."""
    before = part.shape[axis]
    found = [
        (step.axis, at)
        for step in part.steps[axis]
        for at, (count, stride) in enumerate(zip(step.counts, step.strides, strict=True))
        if count * stride == before and part.first[axis] == 0 and count * size % before == 0
    ]
    if len(found) != 1 or (found[0][0] == 0 and part.count != shape[0]):
        raise ForgeError(
            f"{part.tensor} changes its order in the GGUF file with its size",
            "use the model's Hugging Face release instead of the GGUF file",
        )
    on, digit = found[0]

    def counted(step: Steps) -> Steps:
        if step.axis != on:
            return step
        counts = list(step.counts)
        counts[digit] = counts[digit] * size // before
        return replace(step, counts=tuple(counts))

    steps = tuple(tuple(map(counted, of_axis)) for of_axis in part.steps)
    new_shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
    total = shape[on] * size // before
    count = total if on == 0 else part.count
    return replace(part, shape=new_shape, steps=steps, count=count), on, total


def _of_file(learned: LearnedLayout, file: Gguf) -> GgufLayout:
    parts: dict[str, tuple[Part, ...]] = {}
    depth = 1 + max((int(found[1]) for name in learned.outputs if (found := _BLOCK.match(name))), default=-1)
    for tensor in file.tensors:
        output = learned.outputs.get(tensor.name)
        if output is None:
            if tensor.name not in _OF_CONFIG and not _predicts(file, tensor.name, depth):
                raise _foreign(file, f"it has a tensor {tensor.name}", tensor.name)
            parts[tensor.name] = ()
        else:
            parts[tensor.name] = _parts_in(output, tensor.shape[::-1], file, tensor.name)
    for name, output in learned.outputs.items():
        if name not in parts and any(part.tensor not in learned.tied for part in output.parts):
            raise _foreign(file, f"it lacks the tensor {name}", "")
    shapes = {part.tensor: part.shape for held in parts.values() for part in held}
    _check_complete(part for held in parts.values() for part in held)
    return GgufLayout(parts, shapes)


def _predicts(file: Gguf, name: str, depth: int) -> bool:
    """Whether a tensor belongs to the layers that predict more tokens, which transformers does not load."""
    block = _BLOCK.match(name)
    return bool(block and int(block[1]) >= depth and file.get(f"{file.architecture}.nextn_predict_layers", 0))


def _parts_in(output: Output, shape: tuple[int, ...], file: Gguf, name: str) -> tuple[Part, ...]:
    """The parts of a tensor of the file."""
    if output.computed:
        raise ForgeError(
            f"{name} of {file.path} is not a rearrangement of Hugging Face tensors: {output.computed}",
            "use the model's Hugging Face release instead of the GGUF file",
        )
    dropped = max(len(output.shape) - len(shape), 0)  # llama.cpp drops leading axes of size 1
    shape = (1,) * (len(output.shape) - len(shape)) + shape
    axis = output.vocabulary
    if axis is not None and len(shape) == len(output.shape) and shape[axis] != output.shape[axis]:
        (part,) = output.parts
        on = next(at for at, steps in enumerate(part.steps) if any(step.axis == axis for step in steps))
        new_shape = (*part.shape[:on], shape[axis], *part.shape[on + 1 :])
        output = _resized(output, {part.tensor: new_shape})
    if shape != output.shape and output.parts:
        expected, found = ("x".join(map(str, sizes)) for sizes in (output.shape, shape))
        raise _foreign(file, f"{name} has the shape {found} instead of {expected}", name)
    return tuple(_without_axes(part, dropped, shape) for part in output.parts) if dropped else output.parts


def _without_axes(part: Part, dropped: int, shape: tuple[int, ...]) -> Part:
    steps = tuple(tuple(replace(step, axis=step.axis - dropped) for step in of_axis) for of_axis in part.steps)
    return replace(part, start=0, count=shape[dropped], steps=steps)


def _foreign(file: Gguf, what: str, name: str) -> ForgeError:
    if _SEPARATE_EXPERT.search(name):
        return ForgeError(
            f"{file.path} is of an old form, with a tensor for each expert ({name})",
            "convert it again with a current llama.cpp, or download a newer file",
        )
    return ForgeError(
        f"{file.path} is not a file of this model: {what}",
        "convert it again with a current llama.cpp, or use the model's Hugging Face release",
    )


def _check_complete(parts: Iterable[Part]) -> None:
    """Check that the parts of each Hugging Face tensor hold each of its elements once."""
    of_tensor: dict[str, list[Part]] = {}
    for part in parts:
        of_tensor.setdefault(part.tensor, []).append(part)
    for name, held in of_tensor.items():
        if not _is_partition(held):
            raise ForgeError(
                f"the GGUF file does not hold each element of {name} once",
                "use the model's Hugging Face release instead of the GGUF file",
            )


def _is_partition(parts: list[Part]) -> bool:
    """Whether parts hold each element of their tensor once: along one axis they share it out, along others all have all."""
    sets = [[_indices(part, axis) for axis in range(len(part.shape))] for part in parts]
    shared = [axis for axis, size in enumerate(parts[0].shape) if any(len(own[axis]) < size for own in sets)]
    total = sum(math.prod(map(len, own)) for own in sets)
    if len(shared) > 1 or total != math.prod(parts[0].shape):
        return False
    return all(
        sorted(index for own in ([sets[0]] if axis not in shared else sets) for index in own[axis]) == list(range(size))
        for axis, size in enumerate(parts[0].shape)
    )


def _indices(part: Part, axis: int) -> list[int]:
    found: Iterator[int] | list[int] = [part.first[axis]]
    for step in part.steps[axis]:
        found = [index + more for index in found for more in step.indices().tolist()]
    return list(found)

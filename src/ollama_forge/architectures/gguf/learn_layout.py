"""Learn from llama.cpp's converter where a GGUF file holds the elements of each Hugging Face tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.gguf.file_layout import file_layout
from ollama_forge.architectures.gguf.hub_tensors import HubTensors, Shapes, hub_tensors
from ollama_forge.architectures.gguf.outputs import LearnedLayout, Output, check_complete, resized
from ollama_forge.architectures.gguf.session import ConverterError, ConverterSession, converter_session
from ollama_forge.architectures.twin.shrink import Scale, shrink, text_path
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint, find_converter
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part
from ollama_forge.records import from_json

_EXPERTS = 3  # that the converter is asked about: each takes memory, and the others follow by their numbers
_NUMBER = re.compile(r"(\d+)")


def layout_of(config: Mapping[str, Any], file: Gguf) -> GgufLayout:
    """The layout of a GGUF file.

    Args:
        config: the content of the model's config.json; its ``vocab_size`` may differ from the file's.

    Raises:
        ForgeError: the converter is not installed or rejects the model; the file is not one that it writes for this
            model; or it computes a tensor's values in a way that is not known.
    """

    def learn() -> LearnedLayout:
        with converter_session() as session:
            return learn_layout(config, session)

    key = {**config, "converter": converter_fingerprint(find_converter(None))}
    return file_layout(cached(LearnedLayout, ".layout.json", key, None, learn), file)


def learn_layout(config: Mapping[str, Any], session: ConverterSession) -> LearnedLayout:
    """What the converter writes for a config. It is asked about a model with few experts and a small vocabulary.

    Raises:
        ForgeError: as ``layout_of``.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    small_config = shrink(plain, Scale(divisor=1, experts=_EXPERTS), None)
    small, full = hub_tensors(small_config), hub_tensors(plain)
    small_shapes, full_shapes = {**small.stored, **small.tied}, {**full.stored, **full.tied}
    vocabulary = _vocabulary_size(small_config), _vocabulary_size(plain)
    outputs = {}
    for name, told in _places(session, small_config, small).items():
        output = _with_all_experts(from_json(Output, told), small_shapes, full_shapes)
        outputs[name] = resized(_with_vocabulary(output, full_shapes, *vocabulary), full_shapes)
    check_complete(outputs)
    return LearnedLayout(outputs, tuple(full.tied))


def _places(session: ConverterSession, config: Mapping[str, Any], tensors: HubTensors) -> dict[str, Any]:
    try:
        found = session.ask("places", config=config, shapes={**tensors.stored, **tensors.tied})
    except ConverterError:
        if not tensors.tied:
            raise
        found = session.ask("places", config=config, shapes=tensors.stored)  # it may reject a tied head
    return dict(found["tensors"])


def _vocabulary_size(config: Mapping[str, Any]) -> int | None:
    text = config
    for key in text_path(config):
        text = text[key]
    size = text.get("vocab_size")
    return size if isinstance(size, int) else None


def _with_all_experts(output: Output, small: Shapes, full: Shapes) -> Output:
    """Add the experts that the full model has more of, if each is a tensor: names and rows go on by number."""
    if len(output.parts) < 2:
        return output
    first = output.parts[0]
    pieces = [_NUMBER.split(part.tensor) for part in output.parts]
    differing = {at for own in pieces for at, piece in enumerate(own) if pieces[0][at : at + 1] != [piece]}
    if len(differing) != 1:
        return output
    (place,) = differing

    def expert(number: int) -> Part:
        name = "".join([*pieces[0][:place], str(number), *pieces[0][place + 1 :]])
        return replace(first, tensor=name, start=number * first.count)

    count = len(output.parts)
    if any(part != expert(number) for number, part in enumerate(output.parts)):
        return output
    while expert(count).tensor in full and expert(count).tensor not in small:
        count += 1
    return replace(output, shape=(count * first.count, *output.shape[1:]), parts=tuple(map(expert, range(count))))


def _with_vocabulary(output: Output, full: Shapes, small_size: int | None, size: int | None) -> Output:
    """Note along which axis the entries of the vocabulary are."""
    if len(output.parts) == 1 and size is not None:
        (part,) = output.parts
        for axis, sizes in enumerate(zip(part.shape, full[part.tensor], strict=True)):
            if sizes == (small_size, size) and [step.counts for step in part.steps[axis]] == [(small_size,)]:
                return replace(output, vocabulary=part.steps[axis][0].axis)
    return output

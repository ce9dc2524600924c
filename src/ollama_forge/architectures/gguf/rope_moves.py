"""Values of a config that scale rotary frequencies, from the metadata and the vectors of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.leaves import Path, leaves, value_at, with_values
from ollama_forge.architectures.gguf.probe import same
from ollama_forge.architectures.gguf.rope_factors import llama3_parameters
from ollama_forge.architectures.gguf.session import ConverterError
from ollama_forge.architectures.gguf.wanted import Wanted, as_config

_TYPE = "rope_type"
_FACTORS = "rope_freqs.weight"
_MARK = 40  # the first of the numbers that stand for values that are not known yet


def scaled_rope(forward: Forward, wanted: Wanted, config: Mapping[str, Any]) -> Iterator[dict[Path, Any]]:
    """For each kind of scaling that transformers knows, the values from which the converter writes what is wanted."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for path in [path for path in leaves(config) if path[-1] == _TYPE]:
        parent = path[:-1]
        if _FACTORS in wanted.computed:
            theta = value_at(config, (*parent, "rope_theta"))
            found = llama3_parameters(wanted.computed[_FACTORS], theta) if theta else None
            if found is not None:
                yield {(*parent, name): value for name, value in found.items()}
        for kind in ROPE_INIT_FUNCTIONS:
            yield {path: kind, **_marked(forward, wanted, config, {path: kind})}


def _marked(forward: Forward, wanted: Wanted, config: Mapping[str, Any], kind: Mapping[Path, Any]) -> dict[Path, Any]:
    """The values that a kind of scaling needs: each is marked, to see which GGUF key or vector follows it."""
    marks: dict[Path, Any] = {}
    (path,) = kind
    for _ in range(3):  # the converter may look for one only after it has found another
        try:
            absent = forward.absent(with_values(config, {**kind, **marks}))
        except ConverterError:
            break
        new = [other for other in absent if other[:-1] == path[:-1] and other not in marks]
        if not new:
            break
        for other in new:
            marks |= _mark(forward, wanted, config, kind, marks, other)
    try:
        told, computed = _written(forward, with_values(config, {**kind, **marks}))
    except ConverterError:
        return {}
    found = {}
    for other, mark in marks.items():
        key = next((key for key, value in told.items() if same(value, mark) and key in wanted.metadata), None)
        name = next((name for name, value in computed.items() if value == mark and name in wanted.computed), None)
        if key is not None:
            found[other] = as_config(wanted.metadata[key], None)
        elif name is not None:
            found[other] = as_config(wanted.computed[name], None)
    return found


def _written(forward: Forward, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    return forward.metadata(config), forward.computed(config)


def _mark(
    forward: Forward,
    wanted: Wanted,
    config: Mapping[str, Any],
    kind: Mapping[Path, Any],
    marks: Mapping[Path, Any],
    path: Path,
) -> dict[Path, Any]:
    """A number that the converter takes as this value, or a list of as many as a vector of the file has.

    It may take a list only beside another list.
    """
    mark = _MARK + len(marks)
    attempts: list[dict[Path, Any]] = [{path: mark}]
    for length in sorted({len(vector) for vector in wanted.computed.values()}):
        alone = {path: [float(mark)] * length}
        attempts.append(alone)
        attempts += [{**alone, other: [float(m)] * length} for other, m in marks.items() if isinstance(m, int)]
    for attempt in attempts:
        try:
            forward.metadata(with_values(config, {**kind, **marks, **attempt}))
        except ConverterError:
            continue
        return attempt
    return {}

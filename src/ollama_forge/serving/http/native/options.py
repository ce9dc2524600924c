"""Reads ``options`` as Ollama does: it ignores unknown names and null; a value of the wrong type gives status 500."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.requests import BadRequest

_INTEGERS = {"seed", "num_predict", "num_ctx", "top_k", "repeat_last_n"}
_NUMBERS = {
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
}
# Settings of Ollama's runner have no effect here, but a value of the wrong type is rejected as Ollama does.
_RUNNER = {"num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread"}
_RUNNER_FLAGS = {"use_mmap"}
_UNIT = ("top_p", "min_p", "typical_p")
_LARGEST = 3.4e38
_INT64 = (1 << 63) - 1


@dataclass(frozen=True)
class Options:
    """The options of a request; ``num_ctx`` is None if the request does not set it."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int = -1
    num_ctx: int | None = None
    stop: tuple[str, ...] = ()


def options_of(values: Mapping[str, Any]) -> Options:
    """Read ``options``.

    Raises:
        BadRequest: a value has the wrong type (status 500).
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in _INTEGERS | _RUNNER:
            given[name] = _integer(name, value)
        elif name in _NUMBERS:
            given[name] = _number(name, value)
        elif name in _RUNNER_FLAGS:
            if not isinstance(value, bool):
                raise _refused(name, "boolean")
        elif name == "stop":
            given[name] = _texts(name, value)
    sampling = _sampling({name: given[name] for name in given if name in SamplingParams.__dataclass_fields__})
    predict = given.get("num_predict", -1)
    context = given.get("num_ctx")
    return Options(
        sampling,
        num_predict=max(predict, -1),
        num_ctx=None if context is None else max(context, 4),
        stop=tuple(text for text in given.get("stop", ()) if text),
    )


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    sampling = SamplingParams(**given)
    seed = sampling.seed
    return replace(
        sampling,
        temperature=max(sampling.temperature, 0.0),
        top_k=max(sampling.top_k, 0),
        repeat_last_n=max(sampling.repeat_last_n, -1),
        seed=None if seed is None or seed < 0 else seed,
        repeat_penalty=sampling.repeat_penalty if sampling.repeat_penalty > 0 else 1.0,
        **{name: min(max(getattr(sampling, name), 0.0), 1.0) for name in _UNIT},
    )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(name, "integer")
    return max(-_INT64, min(int(value), _INT64))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(name, "float32")
    return float(max(-_LARGEST, min(value, _LARGEST)))


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise _refused(name, "array")
    if not all(isinstance(text, str) for text in value):
        raise BadRequest(f'option "{name}" must be of an array of strings', 500)
    return value


def _refused(name: str, kind: str) -> BadRequest:
    return BadRequest(f'option "{name}" must be of type {kind}', 500)

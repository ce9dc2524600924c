"""A model's own parameters: the options that its makers, or the Modelfile of its run, set where a request does not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.ollama.parameters import KNOWN, STOP, Parameters, Value, parse_assignments
from ollama_forge.ollama.sampling import sampling_parameters
from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.requests import ChatRequest
from ollama_forge.sources.ollama_store import KIND, find_model

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint

_SAMPLING = frozenset(field.name for field in fields(SamplingParams))
_OTHERS = ("num_ctx", "num_predict", STOP)
_SHARE = (0.0, 1.0)
_ANY = (-math.inf, math.inf)
_RANGES = {  # of the options of requests, too
    "temperature": (0.0, math.inf),
    "top_k": (0, math.inf),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "typical_p": _SHARE,
    "repeat_penalty": _ANY,
    "repeat_last_n": (-1, math.inf),
    "presence_penalty": _ANY,
    "frequency_penalty": _ANY,
    "seed": _ANY,
    "num_ctx": (4, math.inf),
    "num_predict": (-1, math.inf),
}
_WHOLE = ("top_k", "repeat_last_n", "seed", "num_ctx", "num_predict")


def model_parameters(checkpoint: Checkpoint) -> dict[str, Value]:
    """The parameters of a checkpoint, by Ollama's names; a number outside its range becomes the nearest in it.

    They are those of ``generation_config.json``. Parameters of the Modelfile that ``run`` wrote beside the checkpoint
    take precedence; a model in Ollama has those of Ollama's store.

    Raises:
        ForgeError: one of these files cannot be read.
    """
    if checkpoint.kind == KIND:
        found: dict[str, Value] = dict(find_model(checkpoint.label).parameters)
    else:
        found = {**sampling_parameters(checkpoint.folder), **_of_modelfile(checkpoint)}
    return usable(dict(sorted(found.items())))


def _of_modelfile(checkpoint: Checkpoint) -> dict[str, Value]:
    """The parameters of the Modelfile of the run that made a checkpoint; empty if no run made it."""
    made = checkpoint.location
    path = made.parent / "Modelfile"
    if not path.is_file():
        return {}
    modelfile = Modelfile.parse(path.read_text(encoding="utf-8", errors="replace"))
    own = made.is_dir() and (made / "abliteration.json").is_file()
    if not own and not any((made.parent / source).resolve() == made.resolve() for source in modelfile.sources):
        return {}
    return parse_assignments([f"{name}={value}" for name, value in modelfile.parameters if name in KNOWN])


def usable(parameters: Parameters) -> dict[str, Value]:
    """The parameters without values that generation cannot use; a number outside its range becomes the nearest in it.

    Parameters that generation does not know stay as they are.
    """
    found = {name: _usable(name, value) for name, value in parameters.items()}
    return {name: value for name, value in found.items() if value is not None}


def _usable(name: str, value: Value) -> Value | None:
    if name == STOP:
        return value if isinstance(value, tuple) else (str(value),)
    if name not in _RANGES:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if (name == "repeat_penalty" and value <= 0) or (name == "seed" and value < 0):
        return None
    least, most = _RANGES[name]
    value = min(max(value, least), most)
    return int(value) if name in _WHOLE else float(value)


def sampling_of(parameters: Parameters) -> dict[str, Any]:
    """Those parameters that are fields of ``SamplingParams``."""
    return {name: value for name, value in parameters.items() if name in _SAMPLING}


def with_parameters(request: ChatRequest, parameters: Parameters) -> ChatRequest:
    """The request with the model's parameters in place of the options that it does not state."""
    silent = {name: value for name, value in parameters.items() if name not in request.stated}
    others: dict[str, Any] = {name: silent[name] for name in _OTHERS if name in silent}
    return replace(request, sampling=replace(request.sampling, **sampling_of(silent)), **others)


def shown(parameters: Mapping[str, Value]) -> str:
    """The parameters as ``/api/show`` prints them: one line for each value, texts in double quotes."""
    lines = []
    for name, value in parameters.items():
        for each in value if isinstance(value, tuple) else (value,):
            lines.append(f"{name:<30} {json.dumps(go_number(each), ensure_ascii=False)}")
    return "\n".join(lines)


def go_number(value: Value) -> Value:
    """A number as Go writes it: 1 instead of 1.0. Other values stay as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""How a model's makers mean it to be sampled: its ``generation_config.json`` as parameters of Ollama."""

from __future__ import annotations

import math
from pathlib import Path

from ollama_forge.files import read_json
from ollama_forge.ollama.parameters import Value

# without these Ollama samples every model with temperature 0.8, top_k 40 and top_p 0.9
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
SAMPLING = tuple(_PARAMETERS.values())


def sampling_parameters(folder: Path) -> dict[str, Value]:
    """The parameters that the ``generation_config.json`` of a checkpoint states; empty without the file.

    ``do_sample`` alone states none.

    Raises:
        ForgeError: the file is no JSON.
    """
    path = folder / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}
    if not isinstance(stated, dict):
        return {}
    found: dict[str, Value] = {}
    for name, parameter in _PARAMETERS.items():
        value = stated.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        found[parameter] = int(value) if parameter == "top_k" else float(value)
    return found


def told(parameters: dict[str, Value]) -> str:
    """Parameters in one line."""
    return ", ".join(f"{name} {value:g}" for name, value in parameters.items() if isinstance(value, int | float))

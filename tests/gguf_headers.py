"""GGUF headers as llama.cpp's converter writes them for a config, without weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from ollama_forge.architectures.gguf.hub_tensors import hub_shapes
from ollama_forge.architectures.gguf.session import ConverterSession
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, Value

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def header(session: ConverterSession, config: Mapping[str, Any], tokens: Mapping[str, int] | None = None) -> Gguf:
    """What the converter writes for a config: metadata, and names and shapes of tensors."""
    plain = json.loads(json.dumps(config, default=str))
    shapes = {name: list(shape) for name, shape in hub_shapes(plain).items()}
    told = session.ask("metadata", config=plain, shapes=shapes)["values"]
    written = session.ask("tensors", config=plain, shapes=shapes)["shapes"]
    told.update({f"tokenizer.ggml.{name}_token_id": value for name, value in (tokens or {}).items()})
    metadata = {key: encoded(value) for key, value in told.items()}
    tensors = tuple(Tensor(name, tuple(shape[::-1]), GGMLQuantizationType.F32) for name, shape in written.items())
    return Gguf(Path(f"{config['model_type']}.gguf"), metadata, tensors)


def encoded(value: Any) -> Value:
    """A metadata value as the converter's writer encodes it."""
    if isinstance(value, list):
        items = [encoded(item) for item in value]
        return Value(_ARRAY, struct.pack("<IQ", items[0].type, len(items)) + b"".join(item.raw for item in items))
    if isinstance(value, bool):
        return Value(_BOOL, struct.pack("<?", value))
    if isinstance(value, int):
        return Value(_UINT32, struct.pack("<I", value)) if value >= 0 else Value(_INT32, struct.pack("<i", value))
    if isinstance(value, float):
        return Value(_FLOAT32, struct.pack("<f", value))
    data = value.encode()
    return Value(_STRING, struct.pack("<Q", len(data)) + data)

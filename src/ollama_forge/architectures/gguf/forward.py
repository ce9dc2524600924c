"""What llama.cpp's converter writes for a config of one Hugging Face class: metadata, and names and shapes of tensors."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ollama_forge.architectures.gguf.hub_tensors import hub_shapes
from ollama_forge.architectures.gguf.leaves import Path, leaves, value_at, with_value
from ollama_forge.architectures.gguf.session import ConverterError, ConverterSession
from ollama_forge.architectures.model_class import ModelClass

_MARKS = (0.4375, 54)  # values that no class has as a default
_MISSING = re.compile(r"KeyError: (.*)")
_MAX_SUPPLEMENTS = 8


class Forward:
    """Completes configs of one class, and asks the converter what it would write for them.

    The converter may look for keys that transformers no longer writes (``n_ctx`` of GPT-2); these are supplied.

    Attributes:
        base: the complete config with the defaults of the class.
        supplied: for each key that is supplied, the path of the value that it stands for; None if the class has none.
    """

    def __init__(self, session: ConverterSession, arch: str, model_type: str, architecture: str) -> None:
        """Complete the default config.

        Args:
            session: a running converter.
            arch: the GGUF architecture.
            model_type, architecture: those of the config.

        Raises:
            ForgeError: the class has no complete default config, or the converter takes none.
        """
        self.session, self.arch, self.architecture = session, arch, architecture
        self.model_class = ModelClass({"model_type": model_type})
        self.supplied: dict[str, Path | None] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self.base = self.completed({"model_type": model_type})
        for _ in range(_MAX_SUPPLEMENTS):
            try:
                self.metadata(self.base)
                break
            except ConverterError as error:
                self._supply(error)

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the defaults of its class for all that it does not name.

        Raises:
            ForgeError: the class rejects the config.
        """
        found = json.loads(json.dumps(self.model_class.complete(config), default=str))
        return {**found, "model_type": self.model_class.model_type, "architectures": [self.architecture]}

    def complete(self, values: Mapping[Path, Any]) -> dict[str, Any]:
        """A complete config with these values; those that depend on them are the class's own choice.

        Raises:
            ForgeError: the class rejects the values.
        """
        config: dict[str, Any] = {"model_type": self.model_class.model_type}
        for path, value in values.items():
            path = self.supplied.get(path[0]) or path if len(path) == 1 else path
            if len(path) > 1 and path[0] not in config:
                config[path[0]] = self.base.get(path[0]) or {}
            config = with_value(config, path, value)
        return self._with_supplements(self.completed(config), values)

    def _with_supplements(self, config: dict[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
        for key, path in self.supplied.items():
            default = self.base.get(key) if path is None else value_at(config, path)
            config[key] = values.get((key,), default)
        return config

    def _supply(self, error: ConverterError) -> None:
        """Supply the key that the converter misses; raise the error if it misses none, or misses it again."""
        missing = _MISSING.search(error.message)
        names = _names(missing[1]) if missing else []
        key = next((name for name in names if name not in self.supplied), None)
        if key is None:
            raise error
        for mark in _MARKS:
            marked = leaves(self.completed({"model_type": self.model_class.model_type, key: mark}))
            path = next((path for path, value in marked.items() if value == mark and path != (key,)), None)
            if path is not None:
                break
        self.supplied[key] = path
        self.base[key] = _MARKS[1] if path is None else value_at(self.base, path)

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys ``ARCH.*`` that the converter writes for a complete config.

        Raises:
            ConverterError: the converter does not take the config.
        """
        return {key: value for key, value in self._ask(config)["values"].items() if key.startswith(f"{self.arch}.")}

    def computed(self, config: Mapping[str, Any]) -> dict[str, list[float]]:
        """The vectors that the converter computes from a complete config, by the names of the GGUF tensors.

        Raises:
            ConverterError: the converter does not take the config.
        """
        return dict(self._ask(config)["extra"])

    def _ask(self, config: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._answers:
            try:
                self._answers[key] = self.session.ask("metadata", config=config, shapes={})
            except ConverterError as error:
                self._answers[key] = {"error": error}
        answer = self._answers[key]
        if "error" in answer:
            raise answer["error"]
        return answer

    def tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes, the row length last, of the tensors that the converter writes for a complete config.

        Raises:
            ForgeError: no model can be built from the config.
            ConverterError: the converter does not take the config.
        """
        shapes = {name: list(shape) for name, shape in hub_shapes(config).items()}
        written = self.session.ask("tensors", config=config, shapes=shapes)["shapes"]
        return {name: tuple(shape) for name, shape in written.items()}


def _names(text: str) -> list[str]:
    """The keys that the message of a KeyError names: ``'n_ctx'``, or ``"could not find any of: ['a', 'b']"``."""
    return re.findall(r"'(\w+)'", str(ast.literal_eval(text))) or re.findall(r"'(\w+)'", text)

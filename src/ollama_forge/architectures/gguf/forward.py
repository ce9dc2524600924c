"""What llama.cpp's converter writes for a config of one class: metadata, and names and shapes of tensors."""

from __future__ import annotations

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
_MAX_SUPPLIED = 8


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
            ForgeError: the class has no complete default config, or the converter does not take it.
        """
        self.session, self.arch, self.model_type, self.architecture = session, arch, model_type, architecture
        self.model_class = ModelClass({"model_type": model_type})
        self.supplied: dict[str, Path | None] = {}
        self._answers: dict[str, dict[str, Any] | ConverterError] = {}
        self._tensors: dict[str, dict[str, tuple[int, ...]]] = {}
        self.base = self._completed({})
        for _ in range(_MAX_SUPPLIED):
            try:
                self.metadata(self.base)
                break
            except ConverterError as error:
                self._supply(error)

    def _completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        named = {"model_type": self.model_type, **config}
        found = json.loads(json.dumps(self.model_class.complete(named), default=str))
        return {**found, "model_type": self.model_type, "architectures": [self.architecture]}

    def complete(self, values: Mapping[Path, Any]) -> dict[str, Any]:
        """A complete config with these values; those that depend on them are the class's own choice.

        Raises:
            ForgeError: the class rejects the values.
        """
        config: dict[str, Any] = {}
        for path, value in values.items():
            target: Path = self.supplied.get(path[0]) or path
            if len(target) > 1 and target[0] not in config:
                config[target[0]] = self.base.get(target[0]) or {}
            config = with_value(config, target, value)
        found = self._completed(config)
        for key, other in self.supplied.items():
            found[key] = values.get((key,), self.base[key] if other is None else value_at(found, other))
        return found

    def _supply(self, error: ConverterError) -> None:
        """Supply a key that the converter misses; raise the error if it misses none, or misses it again."""
        missing = _MISSING.search(error.message)
        names = re.findall(r"'(\w+)'", missing[1]) if missing else []
        key = next((name for name in names if name not in self.base), None)
        if key is None:
            raise error
        self.supplied[key] = path = self._stands_for(key)
        self.base[key] = _MARKS[1] if path is None else value_at(self.base, path)

    def _stands_for(self, key: str) -> Path | None:
        """The path at which the class puts the value of a key that it knows by an older name."""
        for mark in _MARKS:
            for path, value in leaves(self._completed({key: mark})).items():
                if value == mark and path != (key,):
                    return path
        return None

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

    def absent(self, config: Mapping[str, Any]) -> list[Path]:
        """The paths that the converter looks for in a complete config and does not find.

        Raises:
            ConverterError: the converter does not take the config.
        """
        return [tuple(path) for path in self._ask(config)["absent"]]

    def _ask(self, config: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._answers:
            try:
                self._answers[key] = self.session.ask("metadata", config=config, shapes={})
            except ConverterError as error:
                self._answers[key] = error
        answer = self._answers[key]
        if isinstance(answer, ConverterError):
            raise answer
        return answer

    def tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes, the row length last, of the tensors that the converter writes for a complete config.

        Raises:
            ForgeError: no model can be built from the config.
            ConverterError: the converter does not take the config.
        """
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._tensors:
            shapes = {name: list(shape) for name, shape in hub_shapes(config).items()}
            written = self.session.ask("tensors", config=config, shapes=shapes)["shapes"]
            self._tensors[key] = {name: tuple(shape) for name, shape in written.items()}
        return self._tensors[key]

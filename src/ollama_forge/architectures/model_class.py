"""The transformers class that loads a checkpoint: the causal LM, or the multimodal wrapper that its config names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ollama_forge.checkpoints.model_types import model_type_error
from ollama_forge.errors import ForgeError, error_line


def auto_class(config: Mapping[str, Any], *, trust_remote_code: bool = False, text_alone: bool = False) -> Any:
    """``AutoModelForCausalLM`` or ``AutoModelForImageTextToText``: the one that loads a checkpoint with this config.

    It is the causal LM unless the type has none, or ``architectures`` names the wrapper that has a vision tower too.

    Args:
        config: the content of config.json.
        trust_remote_code: whether the checkpoint's own Python code may be executed.
        text_alone: take the causal LM also where ``architectures`` names the wrapper, if the type has both.

    Raises:
        ForgeError: transformers has no such class for the ``model_type``.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if needs_remote_code(config) and trust_remote_code:
        for choice in (AutoModelForCausalLM, AutoModelForImageTextToText):
            if choice.__name__ in config["auto_map"]:
                return choice
        raise ForgeError(
            "the model code that auto_map in config.json names has no class that generates text",
            "give a chat model: one with AutoModelForCausalLM in its auto_map",
        )
    error = model_type_error(config, "the checkpoint")
    if error is not None:
        raise error
    model_type = config["model_type"]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    wrapper = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    named = config.get("architectures") or ()
    if wrapper is not None and (causal is None or (wrapper != causal and wrapper in named and not text_alone)):
        return AutoModelForImageTextToText
    if causal is None and CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:  # nor was one registered
        raise ForgeError(
            f"transformers has no class that generates text for the model_type {model_type!r}",
            "give a chat model: a causal LM, or one that answers with text to images and text",
        )
    return AutoModelForCausalLM


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether only the checkpoint's own Python code can build the model: transformers lacks its ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def has_text_class(config: Mapping[str, Any]) -> bool:
    """Whether a config names a wrapper of a type that has a causal LM too, which loads the text model alone."""
    return auto_class(config) is not auto_class(config, text_alone=True)


class ModelClass:
    """Builds models of the class that loads a checkpoint, from its config or from other configs of the same type."""

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path | None = None,
        *,
        trust_remote_code: bool = False,
        text_alone: bool = False,
    ) -> None:
        """Find the class.

        Args:
            config: the content of config.json.
            folder: the checkpoint's folder, for a model with Python code of its own.
            trust_remote_code: whether that code may be executed.
            text_alone: take the causal LM of a type whose wrapper ``config`` names.

        Raises:
            ForgeError: transformers has no such class, or the code of the folder cannot be executed.
        """
        self.model_type, self.text_alone = str(config.get("model_type")), text_alone
        self._trust = trust_remote_code and needs_remote_code(config)
        self._config, self._folder, self._map = config, folder, config.get("auto_map")
        self._auto = auto_class(config, trust_remote_code=self._trust, text_alone=text_alone)
        self._config_class = _config_class(config, folder, trust_remote_code=self._trust)

    def text_class(self) -> ModelClass | None:
        """The causal LM of a type that has one beside the wrapper, if this is the wrapper; else None."""
        if self._trust or self.text_alone or not has_text_class(self._config):
            return None
        return ModelClass(self._config, text_alone=True)

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the defaults of its class for all that it does not name.

        Raises:
            ForgeError: the class rejects the config.
        """
        try:
            return self._config_class.from_dict(_plain(config)).to_dict()  # type: ignore[no-any-return]
        except Exception as error:  # configs raise anything for values that they don't expect
            raise ForgeError(
                f"config.json cannot be read: {error_line(error)}", "download the model again, or save it again"
            ) from error

    def build(self, config: Mapping[str, Any], device: str) -> Any:
        """A float32 model in eval mode with initial weights; on the meta device without any.

        Raises:
            Exception: anything, if the config does not fit the class.
        """
        built: Any = self._config_class.from_dict(_plain(config))
        if self._trust:
            built.name_or_path, built.auto_map = str(self._folder), self._map
        with torch.device(device):
            model: nn.Module = self._auto.from_config(built, dtype=torch.float32, trust_remote_code=self._trust)
        return model.eval()


def _plain(config: Mapping[str, Any]) -> Any:
    """A deep copy of a config as JSON has it; config.json writes infinity as ``{"__float__": "Infinity"}``."""
    return json.loads(
        json.dumps(config, default=str),
        object_hook=lambda value: float(value["__float__"]) if set(value) == {"__float__"} else value,
    )


def _config_class(config: Mapping[str, Any], folder: Path | None, *, trust_remote_code: bool) -> Any:
    """The class of the config, from transformers or from the Python files in ``folder``."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (needs_remote_code(config) and trust_remote_code):
        error = model_type_error(config, "the checkpoint")
        if error is not None:
            raise error
        return CONFIG_MAPPING[config["model_type"]]
    reference = config["auto_map"].get("AutoConfig")
    if reference is None or "--" in reference or folder is None:
        raise ForgeError(
            "the model needs Python code of its own that is not in its folder (AutoConfig of auto_map in config.json)",
            "download the whole model repository, with its .py files",
        )
    try:
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # foreign code may raise anything
        raise ForgeError(
            f"the model's own code cannot be executed: {error_line(error)}",
            "install the packages that it imports, or take a release that transformers supports",
        ) from error

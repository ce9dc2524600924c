"""Read a LoRA adapter that PEFT saved: its factors and replaced tensors, by the modules that they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ollama_forge.checkpoints.hub import fetch_file, hub_errors
from ollama_forge.errors import ForgeError, first_line
from ollama_forge.files import read_json, sha256_bytes, sha256_file
from ollama_forge.sources.merging import Addition

CONFIG_NAME, WEIGHTS_NAMES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.weight)?")
_PREFIX = "base_model.model."
_ALPHA = 8  # of a config that names none, as in PEFT
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base weights as they are
# settings of LoRA whose adapters are more, or other, than factors
_UNSUPPORTED = (
    "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "trainable_token_indices",
    "target_parameters", "use_qalora", "kasa_config", "velora_config", "arrow_config",
)  # fmt: skip
_MERGE_HINT = "merge it with peft (merge_and_unload, then save_pretrained), and give the result as --model"


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter.

    Attributes:
        label: its folder or Hub id.
        sha256: hash of its config and weights.
        additions: the change of each adapted module's weight ``[out, in]``; of an embedding, ``[entries, d]``.
        replacements: tensors that replace the model's, by their names in the loaded model.
    """

    label: str
    sha256: str
    additions: Mapping[str, Addition]
    replacements: Mapping[str, Tensor]


def read_adapter(adapter: str) -> PeftAdapter:
    """Read an adapter from a folder, or fetch it from the Hub.

    Raises:
        ForgeError: there is no such adapter, or it is not one of LoRA, or of a variant that is more than factors.
    """
    config_path, weights_path = _locate(adapter)
    config = read_json(config_path)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ForgeError(f"{adapter} is not a PEFT adapter", "give a folder with adapter_config.json, or a Hub id")
    _check(adapter, config)
    additions, replacements = _sorted_tensors(adapter, config, _load(weights_path))
    digest = sha256_bytes(f"{sha256_file(config_path)} {sha256_file(weights_path)}".encode())
    return PeftAdapter(adapter, digest, additions, replacements)


def _locate(adapter: str) -> tuple[Path, Path]:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        found = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
        if not (folder / CONFIG_NAME).is_file() or found is None:
            raise ForgeError(
                f"{adapter} is not a PEFT adapter: it lacks {CONFIG_NAME} or {WEIGHTS_NAMES[0]}",
                "give the folder that peft's save_pretrained wrote",
            )
        return folder / CONFIG_NAME, found
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", adapter):
        raise ForgeError(f"{adapter} is not an adapter's folder", "give a folder with adapter_config.json, or a Hub id")
    from huggingface_hub.errors import EntryNotFoundError

    with hub_errors(adapter, None):
        config = fetch_file(adapter, None, CONFIG_NAME)
        try:
            return config, fetch_file(adapter, None, WEIGHTS_NAMES[0])
        except EntryNotFoundError:
            return config, fetch_file(adapter, None, WEIGHTS_NAMES[1])


def _check(adapter: str, config: Mapping[str, Any]) -> None:
    """Raise ForgeError for an adapter that is more than low-rank factors and replaced tensors."""
    used = [name for name in _UNSUPPORTED if config.get(name)]
    reason = ""
    if config["peft_type"] != "LORA":
        reason = f"is of the type {config['peft_type']}, not LORA"
    elif config.get("bias", "none") != "none":
        reason = "changes biases"
    elif config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        reason = f"changes the base weights too (init_lora_weights {config['init_lora_weights']})"
    elif used:
        reason = f"is more than low-rank factors ({used[0]})"
    if reason:
        raise ForgeError(f"the adapter {adapter} {reason}", _MERGE_HINT)


def _load(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ForgeError(f"{path} cannot be read: {first_line(error)}", "save the adapter again") from None
    except Exception:  # what weights_only refuses
        pass
    raise ForgeError(f"{path} holds something else than tensors", "save the adapter again, as safetensors")


def _sorted_tensors(
    adapter: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Addition], dict[str, Tensor]]:
    """The changes of modules, and the replaced tensors."""
    factors: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(_PREFIX)
        found = _FACTOR.fullmatch(bare)
        if found:
            factors.setdefault(found["module"], {})[found["kind"]] = tensor
        elif ".lora_" in bare:
            raise ForgeError(f"the adapter {adapter} is more than low-rank factors: it holds {name}", _MERGE_HINT)
        else:
            replacements[bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if not factors and not replacements:
        raise ForgeError(f"the adapter {adapter} holds no tensors", "save the adapter again")
    return {module: _addition(adapter, config, module, held) for module, held in factors.items()}, replacements


def _addition(adapter: str, config: Mapping[str, Any], module: str, held: Mapping[str, Tensor]) -> Addition:
    kinds = set(held)
    embedding = kinds == {"lora_embedding_A", "lora_embedding_B"}
    if not embedding and kinds != {"lora_A", "lora_B"}:
        raise ForgeError(f"the adapter {adapter} holds only one factor of {module}", "save the adapter again")
    first, second = (held[kind].float() for kind in sorted(kinds))
    if first.ndim != 2 or second.ndim != 2 or second.shape[1] != first.shape[0]:
        raise ForgeError(f"the adapter {adapter} changes {module}, which is no matrix", _MERGE_HINT)
    rank = len(first)
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha", _ALPHA))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not rank:
        raise ForgeError(f"the adapter {adapter} has no number as the scale of {module}", "save the adapter again")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Addition(first.T, second, scale) if embedding else Addition(second, first.T, scale)


def _of_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's path ends with, as in PEFT."""
    patterns = config.get(key)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default

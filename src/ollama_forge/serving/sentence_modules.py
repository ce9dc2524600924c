"""How an embedding model makes one vector of a text: its ``modules.json``, the format of sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import ForgeError
from ollama_forge.files import is_inside, read_json

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")  # in the order of their parts
_FLAGS = {f"pooling_mode_{name}{end}": name for name in POOLINGS for end in ("", "_token", "_tokens")}
_GGUF_POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
_ENCODER_CLASSES = ("Model", "ForMaskedLM")
_LENGTH_FILES = "sentence_*_config.json"


@dataclass(frozen=True)
class Dense:
    """A linear layer after the pooling; ``folder`` has its weights, ``activation`` is torch's name of the function."""

    folder: Path
    activation: str


@dataclass(frozen=True)
class SentenceModules:
    """The steps from a text to its vector.

    Attributes:
        poolings: how token vectors become one; the results of several are joined.
        dense: the linear layers after it.
        max_length: maximum number of tokens, special tokens included; None: the model's own.
        prompt: what stands before each text.
        lower_case: whether texts are lower-cased.
        pools_prompt: whether the tokens of the prompt take part in the pooling.
    """

    poolings: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    max_length: int | None = None
    prompt: str = ""
    lower_case: bool = False
    pools_prompt: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SentenceModules | None:
        """The modules of an embedding model; None for a model that generates text.

        An encoder without a ``modules.json`` has mean pooling.

        Raises:
            ForgeError: a file cannot be read, or names a module or a pooling that is not supported.
        """
        folder = checkpoint.folder
        if not (folder / "modules.json").is_file():
            return cls() if _is_encoder(checkpoint.config) else None
        poolings: tuple[str, ...] = ("mean",)
        dense, pools_prompt = [], True
        for module in _modules(folder):
            kind, place = str(module["type"]).rpartition(".")[2], folder / str(module.get("path") or "")
            match kind:
                case "Pooling":
                    config = _json_object(place / "config.json")
                    poolings, pools_prompt = _poolings(config), config.get("include_prompt") is not False
                case "Dense":
                    activation = str(_json_object(place / "config.json").get("activation_function") or "Tanh")
                    dense.append(Dense(place, activation.rpartition(".")[2]))
                case "Transformer" if place == folder:
                    continue
                case "Normalize" | "Dropout":  # all vectors are normalised at the end
                    continue
                case _:
                    raise ForgeError(f"{checkpoint.label}: modules of the kind {kind} are not supported", _HINT)
        settings = [_json_object(path) for path in sorted(folder.glob(_LENGTH_FILES))[:1]]
        lengths = [one["max_seq_length"] for one in settings if isinstance(one.get("max_seq_length"), int)]
        return cls(
            poolings,
            tuple(dense),
            max_length=lengths[0] if lengths else None,
            prompt=_default_prompt(folder),
            lower_case=any(one.get("do_lower_case") is True for one in settings),
            pools_prompt=pools_prompt,
        )

    @property
    def gguf_pooling(self) -> int | None:
        """The number of the pooling in GGUF's ``pooling_type``; None if it has none there."""
        return _GGUF_POOLING.get(self.poolings[0]) if len(self.poolings) == 1 else None

    def text(self, text: str) -> str:
        """What is encoded for a text."""
        text = (self.prompt + text).strip()
        return text.lower() if self.lower_case else text


_AGAIN = "download the model again"
_HINT = "serve it with sentence-transformers, or choose a model with Pooling, Dense and Normalize alone"


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The entries of ``modules.json``, whose paths stay in the folder."""
    found = read_json(folder / "modules.json")
    modules: list[Any] = found if isinstance(found, list) else [None]
    for module in modules:
        if not isinstance(module, dict) or "type" not in module or not is_inside(str(module.get("path") or ".") + "/x"):
            raise ForgeError(f"{folder / 'modules.json'} does not list modules of this model", _AGAIN)
    return modules


def _is_encoder(config: dict[str, Any]) -> bool:
    """Whether a config is that of an encoder: its class has no head, or one that fills masks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    classes = [str(name) for name in config.get("architectures") or ()]
    decodes = config.get("is_decoder") or config.get("is_encoder_decoder")
    return config.get("model_type") in ENCODERS and not decodes and all(map(_is_encoder_class, classes))


def _is_encoder_class(name: str) -> bool:
    return name.endswith(_ENCODER_CLASSES)


def _poolings(config: dict[str, Any]) -> tuple[str, ...]:
    """The poolings that a ``Pooling`` module names: by flags, or in newer files by name."""
    named = config.get("pooling_mode")
    if named is not None:
        found = [named] if isinstance(named, str) else list(named)
    else:
        flags = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        found = [_FLAGS.get(name, name) for name in flags]
    unknown = [name for name in found if name not in POOLINGS]
    if unknown or not found:
        raise ForgeError(f"the pooling {unknown[0] if unknown else 'of the model'} is not supported", _HINT)
    return tuple(sorted(found, key=POOLINGS.index))


def _default_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    config = _json_object(path) if path.is_file() else {}
    return str((config.get("prompts") or {}).get(config.get("default_prompt_name")) or "")


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ForgeError(f"{path} is not a JSON object", _AGAIN)
    return content

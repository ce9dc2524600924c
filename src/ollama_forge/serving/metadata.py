"""What the APIs report about a model: sizes, names and the keys of ``model_info``; all of it is read from disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.files import read_json

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint

_ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_oss": "gptoss", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}


@dataclass(frozen=True)
class ModelMetadata:
    """What ``/api/show``, ``/api/tags`` and ``/api/ps`` report.

    Attributes:
        digest: 64 hexadecimal digits.
        size: bytes of the weights on disk.
        parameter_size, quantization_level: as Ollama spells them (``134.52M``, ``BF16``).
        model_info: GGUF's keys, such as ``general.architecture`` and ``<architecture>.context_length``.
        system: the model's system prompt, "" for none.
        provenance: lines that say how the checkpoint was edited.
        tensors: name, stored type and shape of each tensor.
    """

    digest: str
    size: int
    modified_at: datetime
    family: str
    families: tuple[str, ...]
    format: str
    parameter_size: str
    quantization_level: str
    parameter_count: int
    context_length: int
    embedding_length: int
    model_info: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""
    system: str = ""
    provenance: tuple[str, ...] = ()
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, system: str | None = None) -> ModelMetadata:
        """Read the metadata of a checkpoint on disk."""
        config = checkpoint.config.get("text_config") or checkpoint.config
        model_type = str(config.get("model_type") or checkpoint.config.get("model_type") or "unknown")
        family = _ARCHITECTURES.get(model_type, model_type.replace("_", ""))
        count = checkpoint.parameters
        quantization = _quantization(checkpoint)
        shapes = _shapes(config)
        files = [path for path in checkpoint.folder.glob("*.safetensors") if path.is_file()]
        modified = max((path.stat().st_mtime for path in [checkpoint.folder / "config.json", *files]), default=0.0)
        return cls(
            digest=checkpoint.fingerprint,
            size=sum(path.stat().st_size for path in files),
            modified_at=datetime.fromtimestamp(modified, UTC),
            family=family,
            families=(family,),
            format="safetensors",
            parameter_size=human_count(count),
            quantization_level=quantization,
            parameter_count=count,
            context_length=int(shapes.get("context_length") or 0),
            embedding_length=int(shapes.get("embedding_length") or 0),
            model_info={
                "general.architecture": family,
                "general.parameter_count": count,
                "general.type": "model",
                **{f"{family}.{key}": value for key, value in sorted(shapes.items())},
            },
            license=_license(checkpoint),
            system=system or "",
            provenance=_provenance(checkpoint),
            tensors=tuple((name, info.dtype, tuple(info.shape)) for name, info in checkpoint.tensors.items()),
        )


def human_count(count: int) -> str:
    """A number of parameters as Ollama prints it: ``134.52M``, ``8.0B``, ``7B``."""
    for unit, letter, digits in ((1_000_000_000, "B", 1), (1_000_000, "M", 2), (1_000, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{digits if count % unit else 0}f}{letter}"
    return str(count)


def _quantization(checkpoint: Checkpoint) -> str:
    """The type that most bytes are stored in."""
    sizes: Counter[str] = Counter()
    forms = {part: packed.codec.label for packed in checkpoint.tensors.packed.values() for part in packed.parts}
    for name, info in checkpoint.tensors.items():
        sizes[forms.get(name, info.dtype)] += info.size
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def _shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the config under GGUF's names, without those that it lacks."""
    heads = config.get("num_attention_heads") or config.get("n_head")
    rope = config.get("rope_parameters") or {}
    found = {
        "context_length": config.get("max_position_embeddings") or config.get("n_positions"),
        "embedding_length": config.get("hidden_size") or config.get("n_embd"),
        "block_count": config.get("num_hidden_layers") or config.get("n_layer"),
        "feed_forward_length": config.get("intermediate_size") or config.get("n_inner"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.sliding_window": config.get("sliding_window"),
        "rope.freq_base": rope.get("rope_theta") or config.get("rope_theta"),
        "expert_count": config.get("num_local_experts") or config.get("num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "vocab_size": config.get("vocab_size"),
    }
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _license(checkpoint: Checkpoint) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        path = checkpoint.folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _provenance(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Lines that say how the checkpoint was edited, from its ``abliteration.json``; they hold no paths."""
    path = checkpoint.folder / "abliteration.json"
    entries = read_json(path) if path.is_file() else None
    if not isinstance(entries, dict):
        return ()
    source, direction = entries.get("source") or {}, entries.get("direction") or {}
    model = str(source.get("model") or "")
    lines = {
        "edited with ollama-forge": entries.get("version"),
        "source": model if source.get("kind") == "hub" else Path(model).name,
        "factors": entries.get("factors"),
        "direction": direction.get("method"),
        "layer": direction.get("layer"),
    }
    return tuple(f"{key}: {value}" for key, value in lines.items() if value not in (None, ""))

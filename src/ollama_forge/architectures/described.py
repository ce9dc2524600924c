"""Assign a role and a layer to every tensor of a checkpoint, as ``architectures/*.toml`` describe.

A tensor that the description does not mention is an error.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm, Place, Role
from ollama_forge.architectures.second_copies import second_copies
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.model_types import model_type_error
from ollama_forge.checkpoints.storage import mxfp4_shape
from ollama_forge.checkpoints.tensors import TensorInfo
from ollama_forge.errors import ForgeError, first_line

_FOLDER = Path(__file__).resolve().parent
_INCOMPLETE_HINT = "download or save it again; check that model_type in config.json is the model's own"


@cache
def known_architectures() -> dict[str, dict[str, Any]]:
    """Map each supported model_type to its description."""
    out: dict[str, dict[str, Any]] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
        out.update(dict.fromkeys(spec["model_types"], spec))
    return out


def map_checkpoint(checkpoint: Checkpoint) -> ModelMap:
    """Map a checkpoint's tensors to roles and layers.

    Raises:
        ForgeError: the architecture is not described, a tensor is missing, or a tensor is not described.
    """
    model_map = map_tensors(checkpoint.config, checkpoint.tensors)
    spec = known_architectures()[model_map.model_type]
    heads = {f"{name}.weight" for name in spec["unembedding"]}  # a tied head need not be stored
    absent = sorted(checkpoint.tensors.absent - heads)
    if absent:
        raise ForgeError(
            f"{checkpoint.label} lacks {len(absent)} tensors that its index names, such as {absent[0]}",
            "download or save it again",
        )
    copies = second_copies(checkpoint.tensors, model_map)
    return replace(model_map, copies=copies) if copies and ties_embeddings(checkpoint.config) else model_map


def map_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelMap:
    """Map tensors to roles and layers.

    Args:
        config: the content of config.json.
        tensors: all tensors of the checkpoint.

    Raises:
        ForgeError: the architecture is not described, a tensor is missing, or a tensor is not described.
    """
    model_type = str(config.get("model_type", ""))
    spec = known_architectures().get(model_type)
    if spec is None:
        raise model_type_error(config, "the checkpoint") or _undescribed_error(model_type, tensors)
    text = config.get("text_config", config)
    declared = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if text.get(key)), 0)
    model_map = _Mapper(model_type, spec, tensors, declared).model_map()
    if model_map.tied and not ties_embeddings(config):
        raise ForgeError(
            f"the checkpoint lacks {spec['unembedding'][0]}.weight, and its config does not tie it to the embedding",
            'download or save it again; if the model ties its head, set "tie_word_embeddings": true in config.json',
        )
    return model_map


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether ``tie_word_embeddings`` is set in the config or, by default, in its transformers class."""
    stated = config.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return bool(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).tie_word_embeddings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForgeError(f"config.json cannot be read: {first_line(error)}", "download or save it again") from error


def _misnamed_error(spec: Mapping[str, Any], model_type: str, tensors: Mapping[str, TensorInfo]) -> ForgeError:
    """The error for a checkpoint whose layers do not have the names that its description gives."""
    layer = re.escape(spec["layer"]).replace(r"\{\}", r"\d+")
    inner = re.compile(rf"(.+?)(?:{'|'.join(map(re.escape, spec['roots']))}){layer}")
    prefixes = {match[1] for name in tensors if (match := inner.match(name))}
    if not prefixes:
        return ForgeError(
            f"the tensors do not have the names of a {model_type!r} model; its matrices: {_matrix_summary(tensors)}",
            "use the model's Hugging Face release, or save it with save_pretrained",
        )
    prefix = min(prefixes, key=len)
    return ForgeError(
        f"the tensor names start with {prefix!r}, which the architecture {model_type!r} does not use",
        f"save the inner model with save_pretrained, or rename the tensors: name.removeprefix({prefix!r})",
    )


def _undescribed_error(model_type: str, tensors: Mapping[str, TensorInfo]) -> ForgeError:
    return ForgeError(
        f"the architecture {model_type!r} is not supported; its matrices: {_matrix_summary(tensors)}",
        f"supported: {', '.join(sorted(known_architectures()))}",
    )


def _matrix_summary(tensors: Mapping[str, TensorInfo]) -> str:
    """The names of all matrices with ``N`` for numbers, each with its count."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        if len(info.shape) >= 2:
            name = ".".join("N" if part.isdigit() else part for part in info.name.split("."))
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} (x{count})" if count > 1 else name for name, count in sorted(counts.items()))


class _Mapper:
    """Builds a ``ModelMap``; every tensor that it uses is claimed, and the remaining ones are an error."""

    def __init__(self, model_type: str, spec: dict[str, Any], tensors: Mapping[str, TensorInfo], declared: int) -> None:
        self.model_type, self.spec, self.tensors = model_type, spec, tensors
        self.unclaimed = set(tensors)
        layer, self.modules = spec["layer"], spec["modules"][0]
        self.root = next(
            (r for r in spec["roots"] if any(n.startswith(r + layer.split("{}")[0]) for n in tensors)), None
        )
        if self.root is None:
            raise _misnamed_error(spec, model_type, tensors)
        start = self.root + layer.split("{}")[0]
        parts = {n[len(start) :].split(".")[0] for n in tensors if n.startswith(start)}
        numbers = {int(part) for part in parts if part.isdecimal()}
        self.n_layers = declared or max(numbers, default=-1) + 1
        if not self.n_layers or not numbers >= set(range(self.n_layers)):
            raise ForgeError("the checkpoint lacks whole layers", _INCOMPLETE_HINT)

    def claim_tensor(self, name: str) -> str | None:
        """Mark a tensor as described and return its name; None if the checkpoint lacks it."""
        if name not in self.tensors:
            return None
        self.unclaimed.discard(name)
        return name

    def norm(self, name: str) -> Norm | None:
        """The norm with this name below the root."""
        weight = self.claim_tensor(f"{self.root}{name}.weight")
        if weight is None:
            return None
        spec, bias = self.spec["norm"], self.claim_tensor(f"{self.root}{name}.bias")
        return Norm(weight, bias, spec["offset"], spec["kind"] == "layernorm", f"{self.modules}{name}")

    def model_map(self) -> ModelMap:
        root, spec = self.root or "", self.spec
        roles = (Role.EMBEDDING, Role.POSITION)
        embedding = [
            self.embedding_or_head(f"{root}{name}", role, f"{self.modules}{name}")
            for name, role in zip(spec["embedding"], roles, strict=False)
        ]
        if not embedding or embedding[0] is None:
            raise ForgeError(f"the checkpoint lacks {root}{spec['embedding'][0]}.weight", _INCOMPLETE_HINT)
        layers = [matrix for index in range(self.n_layers) for matrix in self.layer(index)]
        if self.norm(spec["final_norm"]) is None:
            raise ForgeError(f"the checkpoint lacks {root}{spec['final_norm']}.weight", _INCOMPLETE_HINT)
        for name in spec["norms"]:
            have = [f"{root}{spec['layer'].format(i)}{name}.weight" in self.tensors for i in range(self.n_layers)]
            if any(have) and not all(have):
                raise ForgeError(f"some layers lack the norm {name}", _INCOMPLETE_HINT)
        head = spec["unembedding"][0]
        heads = [self.embedding_or_head(name, Role.UNEMBEDDING, head) for name in spec["unembedding"]]
        unused: set[str] = set()
        for pattern in [*spec.get("copied", []), *(f"*.{other}" for other in spec["others"])]:
            unused.update(fnmatch.filter(self.unclaimed, pattern))
        self.unclaimed -= unused
        if self.unclaimed:
            names = ", ".join(sorted(self.unclaimed)[:6])
            raise ForgeError(
                f"{len(self.unclaimed)} tensors are unknown to the architecture {self.model_type!r}: {names}",
                "use the unmodified bf16 release of the model",
            )
        matrices = [matrix for matrix in [*embedding, *layers, *heads] if matrix is not None]
        return ModelMap(
            model_type=self.model_type,
            d_model=embedding[0].shape[-1],
            matrices=tuple(matrices),
            layers=tuple(self.modules + spec["layer"].format(index).rstrip(".") for index in range(self.n_layers)),
            tied=not any(heads),
            unused=frozenset(unused),
        )

    def embedding_or_head(self, name: str, role: Role, module: str) -> Matrix | None:
        tensor = self.claim_tensor(f"{name}.weight")
        if tensor is None:
            return None
        bias = self.claim_tensor(f"{name}.bias")
        place = Place(module, bias=bias and "bias")
        return Matrix(tensor, role, None, self.tensors[tensor].shape, (place,), role is not Role.UNEMBEDDING, bias)

    def layer(self, index: int) -> list[Matrix]:
        prefix = self.spec["layer"].format(index)
        norms = {name: self.norm(f"{prefix}{name}") for name in self.spec["norms"]}
        return [self.matrix(entry, index, prefix, norms) for entry in self.spec["matrix"]]

    def matrix(self, entry: dict[str, Any], index: int, prefix: str, norms: dict[str, Norm | None]) -> Matrix:
        experts, name = entry.get("experts", False), f"{self.root}{prefix}{entry['name']}"
        tensor = name if experts else f"{name}.weight"
        mxfp4 = experts and tensor not in self.tensors and f"{tensor}_blocks" in self.tensors
        for part in (f"{tensor}_blocks", f"{tensor}_scales") if mxfp4 else (tensor,):
            if self.claim_tensor(part) is None:
                raise ForgeError(f"the checkpoint lacks {part}", _INCOMPLETE_HINT)
        reads: Norm | None = None
        if not entry.get("writes", False) and entry["reads"] != [""]:
            reads = next((norms[norm] for norm in entry["reads"] if norms[norm] is not None), None)
            if reads is None:
                raise ForgeError(f"the checkpoint lacks the norm before {name}", _INCOMPLETE_HINT)
        post_norm = norms[entry["post_norm"]] if "post_norm" in entry else None
        if "post_norm" in entry and post_norm is None:
            raise ForgeError(f"the checkpoint lacks the norm after {name}", _INCOMPLETE_HINT)
        bias = self.claim_tensor(f"{name}_bias" if experts else f"{name}.bias")
        transposed, module = entry.get("layout", "out_in") == "in_out", f"{self.modules}{prefix}{entry['name']}"
        owner, parameter = module.rsplit(".", 1) if experts else (module, "weight")
        place = Place(
            owner,
            parameter,
            bias=None if bias is None else f"{parameter}_bias" if experts else "bias",
            transposed=transposed,
            linear=not experts,
        )
        return Matrix(
            tensor=tensor,
            role=Role(entry["role"]),
            layer=index,
            shape=mxfp4_shape(self.tensors[f"{tensor}_blocks"].shape) if mxfp4 else self.tensors[tensor].shape,
            places=(place,),
            writes=entry.get("writes", False),
            bias=bias,
            reads=reads,
            post_norms=() if post_norm is None else (post_norm,),
            transposed=transposed,
            experts=experts,
            mxfp4=mxfp4,
        )

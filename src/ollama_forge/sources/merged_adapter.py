"""A model with a PEFT adapter merged into it, as a checkpoint in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, Place, Role
from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, companions
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.quantised import QUANTISATION_KEYS
from ollama_forge.errors import ForgeError
from ollama_forge.files import atomic_folder, disk_errors, human_size, read_json, write_json
from ollama_forge.progress import status
from ollama_forge.sources.merging import Addition, Change, Replacement, placed, transposed, write_changed
from ollama_forge.sources.peft_adapter import PeftAdapter, read_adapter
from ollama_forge.system import free_space

_CONFIG = "config.json"
_MERGE_HINT = "merge it with peft (merge_and_unload, then save_pretrained), and give the result as --model"
_BASE_HINT = "give the model that the adapter was trained on as --model"


def with_adapter(source: Checkpoint, adapter: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Merge a PEFT adapter into a model, and return the merged checkpoint; the same merge is done once and cached.

    Args:
        adapter: the folder of the adapter, or its Hub id.

    Raises:
        ForgeError: the source is a GGUF file; the adapter cannot be read, is not one of LoRA, or does not fit the
            model; or the disk is full.
    """
    if isinstance(source, GgufCheckpoint):
        raise ForgeError(
            f"--adapter cannot be merged into the GGUF file {source.label}",
            "give the Hugging Face release of the model as --model",
        )
    read = read_adapter(adapter)
    place = Path(adapter).expanduser()
    label = f"{source.public_name} + {place.resolve().name if place.is_dir() else adapter}"
    folder = cache_folder("merged", f"{source.fingerprint[:16]}-{read.sha256[:16]}")
    if not (folder / _CONFIG).is_file():
        changes = adapter_changes(source, read, trust_remote_code=trust_remote_code)
        _check_room(source, folder)
        with status(f"merging {adapter} (once)"):
            _write(source, changes, folder)
    return Checkpoint(folder, label, "merged", read.sha256)


def adapter_changes(source: Checkpoint, adapter: PeftAdapter, *, trust_remote_code: bool = False) -> dict[str, Change]:
    """The changes that an adapter makes, by the names of the checkpoint's tensors.

    Raises:
        ForgeError: the model has no such module, or one of another shape.
    """
    matcher = _Matcher(source, adapter.label, trust_remote_code)
    changes: dict[str, Change] = {}
    for module, addition in adapter.additions.items():
        for name, change in matcher.additions(module, addition):
            if name in changes:
                raise matcher.failure(f"changes {name} twice, as {module} and as another module", _MERGE_HINT)
            changes[name] = change
    for parameter, values in adapter.replacements.items():
        name = matcher.replaced(parameter, tuple(values.shape))
        added = changes.get(name)
        if isinstance(added, Addition):  # PEFT saves an adapted embedding too
            values = values.float() + added.scale * (added.left @ added.right.T)
        changes[name] = Replacement(values)
    return changes


class _Matcher:
    """Finds the tensors on disk of the modules that an adapter names, first by their names, then by the learned map."""

    def __init__(self, source: Checkpoint, label: str, trust_remote_code: bool) -> None:
        self.source, self.label = source, label
        self.shapes = source.tensors.shapes
        self.model = map_checkpoint(source, trust_remote_code=trust_remote_code)

    def additions(self, module: str, addition: Addition) -> Iterator[tuple[str, Addition]]:
        """The change of each tensor on disk that a module's weight is made of."""
        placed_here = self._placed(module)
        if not placed_here:  # a module that the map does not know, such as one of a vision tower
            name = f"{module}.weight"
            if name not in self.shapes:
                raise self.failure(f"changes {module}, which {self.source.label} does not have", _BASE_HINT)
            self._check_shape(name, addition, self.shapes[name])
            yield name, addition
        for matrix, place in placed_here:
            self._check_untied(matrix)
            part = Addition(addition.left[as_slice(place.rows)], addition.right, addition.scale)
            if place.stored_rows is not None:
                part = placed(part, as_slice(place.stored_rows), matrix.out_features)
            self._check_shape(matrix.tensor, part, (matrix.out_features, matrix.in_features))
            yield matrix.tensor, transposed(part) if matrix.transposed else part

    def replaced(self, parameter: str, shape: tuple[int, ...]) -> str:
        """The tensor on disk of a parameter that an adapter replaces."""
        module, _, kind = parameter.rpartition(".")
        here = [(matrix, place) for matrix, place in self._placed(module) if kind == "weight" and place.rows is None]
        for matrix, _ in here:
            self._check_untied(matrix)
        names = [matrix.tensor for matrix, _ in here] or [parameter]
        if len(names) != 1 or names[0] not in self.shapes:
            raise self.failure(f"replaces {parameter}, which {self.source.label} does not store", _BASE_HINT)
        if self.shapes[names[0]] != shape:
            raise self._misfit(names[0], shape, self.shapes[names[0]])
        return names[0]

    def failure(self, what: str, hint: str) -> ForgeError:
        return ForgeError(f"the adapter {self.label} {what}", hint)

    def _placed(self, module: str) -> list[tuple[Matrix, Place]]:
        """The matrices that the weight of a module of the loaded model is made of, if it is a plain matrix."""
        return [
            (matrix, place)
            for matrix in self.model.matrices
            for place in matrix.places
            if (place.module, place.parameter, place.expert, matrix.experts) == (module, "weight", None, False)
        ]

    def _check_untied(self, matrix: Matrix) -> None:
        if matrix.role in (Role.EMBEDDING, Role.UNEMBEDDING) and (self.model.tied or self.model.copies):
            raise self.failure(
                f"changes {matrix.tensor}, which is embedding and unembedding in one: it would change only one of them",
                "train the adapter without them, or untie them first",
            )

    def _check_shape(self, name: str, change: Addition, expected: tuple[int, ...]) -> None:
        given = (len(change.left), len(change.right))
        if given != expected:
            raise self._misfit(name, given, expected)

    def _misfit(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> ForgeError:
        given, stored = ("x".join(map(str, sizes)) for sizes in (shape, expected))
        return self.failure(f"changes {name} as {given}, and {self.source.label} has it as {stored}", _BASE_HINT)


def as_slice(rows: range | None) -> slice:
    """The slice of these rows; None stands for all rows."""
    return slice(None) if rows is None else slice(rows.start, rows.stop, rows.step)


def _check_room(source: Checkpoint, folder: Path) -> None:
    needed = sum(shard.stat().st_size for shard in source.tensors.shards)
    needed += 2 * sum(packed.count for packed in source.tensors.packed.values())
    free = free_space(folder.parent)
    if needed > free:
        raise ForgeError(
            f"merging needs {human_size(needed)} in {folder.parent}, {human_size(free)} are free",
            "free disk space, or set OLLAMA_FORGE_CACHE to a folder on another disk",
        )


def _write(source: Checkpoint, changes: dict[str, Change], folder: Path) -> None:
    with atomic_folder(folder) as partial, disk_errors(folder):
        unpacked = write_changed(source.tensors, changes, partial)
        for name in (*companions(source.folder), *([CARD] if (source.folder / CARD).is_file() else [])):
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, partial / name)
        if unpacked:
            write_json(partial / _CONFIG, _unquantised(read_json(partial / _CONFIG)))


def _unquantised(config: dict[str, object]) -> dict[str, object]:
    """A config, and its text config, without a quantisation."""
    kept = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    return {
        key: _unquantised(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in kept.items()
    }

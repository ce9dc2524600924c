"""Write an edited GGUF file: the source's bytes, with the edited matrices encoded again in place.

The metadata stays as it is, with keys ``ollama_forge.*`` added. Tensors keep their order and their types, and all that
the plan does not edit is copied byte by byte.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor as Values

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.codec import decode_rows, encode_rows
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, Value, row_size, value_of, write_header
from ollama_forge.checkpoints.gguf.tensors import GgufTensors
from ollama_forge.checkpoints.gguf.types import can_encode, nearest_encodable
from ollama_forge.checkpoints.storage import decode_tensor, tensor_bytes
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import blocks
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.background_hash import HashThread
from ollama_forge.edits.blocks import BlockwiseEdit
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.edited_shard import MatrixSums, bias_shifts
from ollama_forge.edits.plan import EditPlan, MatrixEdit, check_finite
from ollama_forge.edits.provenance import describe_edit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.source_files import hashing_source
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import atomic_file, copy_range, disk_errors, human_size, left_by_killed, read_at, write_all
from ollama_forge.progress import bar, say
from ollama_forge.system import free_space, return_freed_memory

PREFIX = "ollama_forge."
HISTORY = f"{PREFIX}history"
_SPLIT = "split."
_ALIGNED = 1 << 12  # upper bound in bytes on what aligning a tensor adds
Types = Mapping[str, GGMLQuantizationType]


def write_gguf(
    checkpoint: GgufCheckpoint,
    model: ModelMap,
    plan: EditPlan,
    path: Path,
    *,
    settings: EditSettings | None,
    direction: RefusalDirection | None = None,
    provenance: Mapping[str, Any] | None = None,
    types: Types | None = None,
    importance: Mapping[str, Values] | None = None,
) -> AppliedEdit:
    """Write the edited file to ``path`` atomically. Memory is bounded by the largest matrix in its stored form.

    Args:
        provenance: further entries for the metadata, such as ``certificate`` and ``lists``.
        types: the types to encode the edited tensors in, by the names of the file's tensors; None for their own, or the
            nearest K-quant where that cannot be encoded.
        importance: for tensors of the file, the importance of each value of a row, ``[matrices, row length]``.

    Raises:
        UsageError: ``path`` is the source, or lies in the store of an Ollama.
        ForgeError: too little disk space, a damaged source, or a failed write; ``path`` is then unchanged.
    """
    planned = planned_types(checkpoint, plan, types)
    described = describe_edit(checkpoint, model, plan, settings, direction)
    with hashing_source(checkpoint) as hashes:
        described["source"]["files"] = hashes.digests()
    metadata = edited_metadata(checkpoint.file.metadata, {**described, **(provenance or {})})
    check_target(checkpoint, path, file_size(checkpoint.file, metadata, planned))
    if types is None:
        _say_changed_types(checkpoint.file, planned)
    with atomic_file(path) as partial, disk_errors(path), partial.open("w+b", buffering=0) as out:
        tensors = [Tensor(tensor.name, tensor.shape, planned[tensor.name]) for tensor in checkpoint.file.tensors]
        placed = write_header(out, metadata, tensors)
        writer = _GgufWriter(checkpoint, plan, Gguf(partial, metadata, placed), out, importance or {})
        return writer.run(described["settings"])


# -- before writing -------------------------------------------------------------------------------------------------


def planned_types(
    checkpoint: GgufCheckpoint, plan: EditPlan, types: Types | None = None
) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor of the edited file; see ``write_gguf``."""
    names, parts = plan.changed_tensors, checkpoint.layout.parts
    planned: dict[str, GGMLQuantizationType] = {}
    for tensor in checkpoint.file.tensors:
        planned[tensor.name] = tensor.type
        if any(part.tensor in names for part in parts.get(tensor.name, ())):
            if types is not None:
                planned[tensor.name] = types[tensor.name]
            elif not can_encode(tensor.type):
                planned[tensor.name] = nearest_encodable(tensor.type, tensor.row_length)
    return planned


def _say_changed_types(file: Gguf, types: Types) -> None:
    changed = [tensor for tensor in file.tensors if types[tensor.name] != tensor.type]
    for (old, new), group in groupby(sorted(changed, key=_names(types)), key=_names(types)):
        names = [tensor.name for tensor in group]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"note: {names[0]}{more}: {old} cannot be encoded, so the edited tensors are {new}")


def _names(types: Types) -> Any:
    return lambda tensor: (tensor.type.name, types[tensor.name].name)


def kept_metadata(source: Mapping[str, Value]) -> dict[str, Value]:
    """The metadata of a file, without what an earlier edit added, and without what a split file says of its parts."""
    return {key: value for key, value in source.items() if not key.startswith((PREFIX, _SPLIT))}


def edited_metadata(source: Mapping[str, Value], entries: Mapping[str, Any]) -> dict[str, Value]:
    """The source's metadata with ``entries`` under ``ollama_forge.*``: text as it is, anything else as JSON.

    The entries of an earlier edit move to ``ollama_forge.history``, a list of their values that ends with the latest.
    """
    kept = kept_metadata(source)
    earlier = {key: value.python() for key, value in source.items() if key.startswith(PREFIX)}
    history = json.loads(earlier.pop(HISTORY, "[]"))
    if earlier:
        history.append({key.removeprefix(PREFIX): value for key, value in earlier.items()})
    named = {key: value for key, value in entries.items() if value is not None}
    for key, value in named.items():
        kept[f"{PREFIX}{key}"] = value_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    if history:
        kept[HISTORY] = value_of(json.dumps(history, sort_keys=True))
    return kept


def file_size(file: Gguf, metadata: Mapping[str, Value], types: Types) -> int:
    """Upper bound in bytes on the size of the edited file."""
    header = sum(len(key.encode(errors="surrogateescape")) + len(value.raw) + 16 for key, value in metadata.items())
    entries = sum(len(tensor.name.encode(errors="surrogateescape")) + 96 for tensor in file.tensors)
    data = sum(tensor.rows * row_size(types[tensor.name], tensor.row_length) + _ALIGNED for tensor in file.tensors)
    return header + entries + data


def check_target(checkpoint: GgufCheckpoint, path: Path, needed: int) -> None:
    """Check that ``path`` is neither a source nor in the store of an Ollama, and that ``needed`` bytes are free.

    Raises:
        UsageError, ForgeError: one of these does not hold.
    """
    target = path.absolute().resolve()
    if any(target == part.resolve() or (path.exists() and part.samefile(path)) for part in checkpoint.file.parts):
        raise UsageError(f"{path} is the model itself", "give another file for the edited model")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "give a file, or use --output-dir")
    if any((folder / "manifests").is_dir() and (folder / "blobs").is_dir() for folder in target.parents):
        raise UsageError(f"{path} lies in Ollama's own store", "give a file elsewhere, and register it with convert")
    free = free_space(path.parent) + left_by_killed(path)
    if needed > free:
        raise ForgeError(
            f"the edited file needs {human_size(needed)}, but only {human_size(free)} are free at {path.parent}",
            "free disk space or choose another folder",
        )


# -- writing --------------------------------------------------------------------------------------------------------


class _GgufWriter:
    """Fills a file whose header is written.

    Args:
        file: the header.
        out: the file, open for reading and writing.
    """

    def __init__(
        self, checkpoint: GgufCheckpoint, plan: EditPlan, file: Gguf, out: FileIO, importance: Mapping[str, Values]
    ) -> None:
        self.checkpoint, self.plan, self.file, self.out = checkpoint, plan, file, out
        self.importance = importance
        self.label = checkpoint.label
        copies: GgufCheckpoint | None = checkpoint
        self.views: list[tuple[GgufTensors, GgufTensors]] = []
        while copies is not None:
            self.views.append((copies.tensors, GgufTensors(checkpoint.folder, file, copies.layout)))
            copies = copies.further_copies(plan.changed_tensors)
        self.records: dict[str, MatrixRecord] = {}
        self.bias_shifts: dict[str, Values] = {}
        self.changed: set[str] = set()
        self.leaks: dict[str, float] = {}
        self.stored_as: dict[str, str] = {}
        self.hashing = HashThread()

    def run(self, settings: dict[str, Any]) -> AppliedEdit:
        steps = len(self.file.tensors) + len(self.plan.edits)
        with closing(self.hashing), bar(f"writing {self.file.path.stem}", steps) as advance:
            for before, after in zip(self.checkpoint.file.tensors, self.file.tensors, strict=True):
                self._copy(before, after)
                advance(1)
            for edit in self.plan.edits.values():
                self._edit(edit)
                return_freed_memory()
                advance(1)
        stored: Counter[str] = Counter()
        for tensor in self.file.tensors:
            stored[tensor.type.name] += tensor.size
        record = EditRecord(
            self.plan.factors,
            self.checkpoint.fingerprint,
            self.records,
            self.bias_shifts,
            settings,
            self.plan.fitted_to,
        )
        return AppliedEdit(record, frozenset(self.changed), stored, False, self.leaks, self.stored_as)

    def _copy(self, before: Tensor, after: Tensor) -> None:
        """Copy a tensor, in blocks of rows that are decoded and encoded if its type changes."""
        with before.file.open("rb", buffering=0) as source:
            self.out.seek(after.start)
            if before.type == after.type:
                copy_range(source, before.start, before.size, self.out)
                return
            step = max(1, blocks.BLOCK // before.row_length)
            size = row_size(before.type, before.row_length)
            for row in range(0, before.rows, step):
                count = min(step, before.rows - row)
                data = torch.frombuffer(read_at(source, before.start + row * size, count * size), dtype=torch.uint8)
                values = decode_rows(data.view(count, size), before.type)
                write_all(self.out, tensor_bytes(encode_rows(values, after.type)))

    def _edit(self, edit: MatrixEdit) -> None:
        """Write an edited matrix, and its bias, into every tensor of the file that holds them."""
        for source, target in self._copies(edit.matrix.tensor):
            self._edit_matrix(edit, source, target)
        bias = edit.matrix.bias
        if bias is not None and edit.bias_edit is not None:
            for source, target in self._copies(bias):
                self._edit_bias(edit, bias, source, target)

    def _edit_matrix(self, edit: MatrixEdit, source: GgufTensors, target: GgufTensors) -> None:
        name = edit.matrix.tensor
        sums = MatrixSums(edit, self.hashing.blake3(), self.hashing.blake3())
        size, error = 0.0, 0.0
        for expert in experts_of(edit.matrix):
            blockwise = BlockwiseEdit(source, edit, expert, self.label, target.codec_of(name, expert, self.importance))
            counted = sums.add_blocks(blockwise.blocks(sums.source))
            for rows, encoded in blockwise.encode_parts(counted):
                size, error = math.hypot(size, encoded.edit_norm), math.hypot(error, encoded.kept_error)
                places = target.places(name, expert, rows if blockwise.by_rows else None)
                for place, part in zip(places, encoded.parts, strict=True):
                    place.write(self.out, part)
                    sums.result.update(tensor_bytes(part))
        record = sums.record()
        self.records.setdefault(name, record)
        if record.source_hash != record.result_hash:
            self.changed.add(name)
        if size:
            self.leaks[name] = max(error / size, self.leaks.get(name, 0.0))
            self.stored_as[name] = target.packed[name].codec.label

    def _edit_bias(self, edit: MatrixEdit, name: str, source: GgufTensors, target: GgufTensors) -> None:
        info = source[name]
        bias = decode_tensor(source.read_bytes(name), info.dtype, info.shape)
        check_finite(bias, name, self.label)
        self.bias_shifts[name] = bias_shifts(source, edit, bias, self.label)
        for start, data in target.encoded(name, bias + self.bias_shifts[name]):
            if bytes(data) != bytes(read_at(self.out, start, len(data))):
                self.changed.add(name)
            self.out.seek(start)
            write_all(self.out, data)

    def _copies(self, name: str) -> Iterator[tuple[GgufTensors, GgufTensors]]:
        """The source and the target, for each time that the file holds a tensor."""
        for source, target in self.views:
            if name in source:
                yield source, target

"""Apply an edit plan to the tensors of a checkpoint on disk, one at a time; tensors without an edit are copied."""

from __future__ import annotations

import hashlib
import math
import socket
import statistics
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.base import PackedTensor
from ollama_forge.checkpoints.storage import decode_tensor, encode_tensor, round_tensor, stored_tensor, tensor_bytes
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME, CheckpointTensors, TensorInfo
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.cluster.workers import Workers
from ollama_forge.edits import blocks
from ollama_forge.edits.blocks import BlockwiseEdit, EditedBlock, JoinedFactors, join_blocks
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord, stacked
from ollama_forge.edits.expert_groups import equal, grouped
from ollama_forge.edits.out_dtype import UNPACKED, OutDtype
from ollama_forge.edits.plan import BiasEdit, EditPlan, MatrixEdit, ScaledFactors, check_finite
from ollama_forge.errors import ForgeError
from ollama_forge.files import disk_errors, write_json
from ollama_forge.progress import bar
from ollama_forge.sources.here import on_this_machine
from ollama_forge.system import return_freed_memory

_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class AppliedEdit:
    """The result of ``apply_plan``.

    Attributes:
        record: the edit, with hashes and the relative change of each matrix.
        changed: names of the tensors whose bytes differ from the source's.
        stored: storage type -> number of bytes written in this type.
        unpacked: whether packed tensors (FP8, MXFP4) were decoded.
        leaks: how much of each matrix's edit rounding to a packed form undid, as a share of the edit at strength 1. If
            the edit removes a direction, this is what is left of the component along it.
        packed_as: for each matrix in ``leaks``, the name of its form.
    """

    record: EditRecord
    changed: frozenset[str]
    stored: Mapping[str, int]
    unpacked: bool
    leaks: Mapping[str, float] = field(default_factory=dict)
    packed_as: Mapping[str, str] = field(default_factory=dict)


def apply_plan(
    checkpoint: Checkpoint,
    plan: EditPlan,
    folder: Path,
    out_dtype: OutDtype,
    settings: dict[str, Any],
    workers: Workers | None = None,
) -> AppliedEdit:
    """Write the edited weights into ``folder``, with an index if they are sharded.

    Args:
        folder: an existing, empty folder.
        settings: the settings of the edit, for its record.
        workers: they write the shards, on storage that they share with this process; None to write them here.

    Raises:
        ForgeError: an edited tensor holds NaN or a value too large for its type, a source file is cut short, or the
            disk is full.
    """
    writer = _EditWriter(checkpoint, plan, folder, out_dtype)
    with disk_errors(folder), bar("writing tensors", len(checkpoint.tensors)) as advance:
        if workers is None:
            for shard in writer.tensors.shards:
                writer.write(shard, advance)
        else:
            shards = [shard.name for shard in writer.tensors.shards]
            setup = _WriterOnWorker(replace(checkpoint), plan, folder.absolute(), out_dtype)
            for part in workers.map(setup, _write_on_worker, shards):
                writer.add(part)
                advance(len(part.weight_map))
            for path in folder.glob(f"*{_UNFINISHED}"):  # of workers that were lost
                path.unlink()
        writer.write_index()
    return writer.applied(settings)


@dataclass
class _Written:
    """What is known of the shards that were written: see ``AppliedEdit`` and ``EditRecord``."""

    weight_map: dict[str, str] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)
    records: dict[str, MatrixRecord] = field(default_factory=dict)
    bias_shifts: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    leaks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _WriterOnWorker:
    """Makes the function that writes a shard, where it is called."""

    checkpoint: Checkpoint
    plan: EditPlan
    folder: Path
    out_dtype: OutDtype

    def __call__(self) -> Callable[[str], _Written]:
        checkpoint = on_this_machine(self.checkpoint)
        if not self.folder.is_dir():
            raise ForgeError(
                f"{socket.gethostname()} has no {self.folder}",
                "give an --output-dir on storage that all nodes see under the same path",
            )

        def write(name: str) -> _Written:
            writer = _EditWriter(checkpoint, self.plan, self.folder, self.out_dtype)
            with disk_errors(self.folder):
                shard = next(shard for shard in writer.tensors.shards if shard.name == name)
                writer.write(shard, lambda _: None, unfinished=f".{uuid.uuid4().hex}{_UNFINISHED}")
            return writer.written

        return write


def _write_on_worker(write: Callable[[str], _Written], name: str) -> _Written:
    return write(name)


@dataclass
class MatrixSums:
    """Running hashes and squared norms over the blocks and experts of one matrix, and the factors of each expert."""

    source: Any = field(default_factory=hashlib.sha256)
    result: Any = field(default_factory=hashlib.sha256)
    squared_norm: float = 0.0
    squared_change: float = 0.0
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_blocks(self, edit: MatrixEdit, edited_blocks: Iterator[EditedBlock]) -> Iterator[EditedBlock]:
        """Yield the blocks of one matrix (of one expert), and add up their norms; overwrites ``before``."""
        parts: list[JoinedFactors] = []
        for block in edited_blocks:
            parts.append(JoinedFactors(block.after.factors, block.after.scale))
            self.squared_norm += float(torch.linalg.vector_norm(block.before)) ** 2
            self.squared_change += float(torch.linalg.vector_norm(block.before.sub_(block.after.weight))) ** 2
            yield block
        joined = join_blocks(edit, parts).factors
        self.factors.append((joined.L, joined.K))

    def record(self, edit: MatrixEdit) -> MatrixRecord:
        left, right = stacked(self.factors) if edit.matrix.experts else self.factors[0]
        return MatrixRecord(
            left,
            right,
            edit.strength,
            edit.rescale,
            self.source.hexdigest(),
            self.result.hexdigest(),
            (self.squared_change / self.squared_norm) ** 0.5 if self.squared_norm else 0.0,
        )


class _EditWriter:
    def __init__(self, checkpoint: Checkpoint, plan: EditPlan, folder: Path, out_dtype: OutDtype) -> None:
        self.checkpoint, self.plan, self.folder, self.out_dtype = checkpoint, plan, folder, out_dtype
        self.tensors = checkpoint.tensors
        self.names = _shard_names(self.tensors)
        self.owners = {part: tensor for tensor in self.tensors.packed.values() for part in tensor.parts + tensor.extras}
        edited = [tensor for name, tensor in self.tensors.packed.items() if name in plan.edits]
        kept = out_dtype.keeps_packed and all(tensor.is_writable for tensor in edited)
        self.unpack = bool(self.owners) and not kept
        self.scales: dict[str, memoryview] = {}  # of edited packed tensors, which are encoded with their codes
        self.biases = {
            edit.matrix.bias: edit for edit in plan.edits.values() if edit.bias_edit is not None and edit.matrix.bias
        }
        self.written = _Written()

    def write(self, shard: Path, advance: Callable[[int], None], *, unfinished: str = "") -> None:
        """Write one shard.

        Args:
            advance: called with the number of newly written tensors.
            unfinished: what the name of the file ends in until it is whole, so that a lost worker leaves no shard.
        """
        outputs, name, written = self.outputs_of(shard), self.names[shard], self.written
        path = self.folder / name
        with ShardWriter(path.with_name(name + unfinished), outputs) as writer:
            for out in outputs:
                if out.copied is not None:
                    writer.copy(out.copied)
                else:
                    writer.write(self.computed_bytes(out))
                    return_freed_memory()
                written.weight_map[out.name] = name
                written.stored[out.dtype] += out.size
                advance(1)
        if unfinished:
            writer.path.replace(path)

    def add(self, other: _Written) -> None:
        """Add what is known of a shard that another process wrote."""
        own = self.written
        own.weight_map.update(other.weight_map)
        own.stored.update(other.stored)
        own.records.update(other.records)
        own.bias_shifts.update(other.bias_shifts)
        own.changed.update(other.changed)
        own.leaks.update(other.leaks)

    def write_index(self) -> None:
        """Write the index of all shards, if there are several."""
        if list(self.names.values()) != [SINGLE_NAME]:
            index = {"metadata": {"total_size": self.written.stored.total()}, "weight_map": self.written.weight_map}
            write_json(self.folder / INDEX_NAME, index)

    def applied(self, settings: dict[str, Any]) -> AppliedEdit:
        """The edit, after all shards have been written."""
        written = self.written
        record = EditRecord(
            self.plan.factors,
            self.checkpoint.fingerprint,
            {name: written.records[name] for name in self.plan.edits if name in written.records},
            written.bias_shifts,
            settings,
            self.plan.fitted_to,
        )
        packed_as = {name: self.tensors.packed[name].codec.label for name in written.leaks}
        return AppliedEdit(record, frozenset(written.changed), written.stored, self.unpack, written.leaks, packed_as)

    def outputs_of(self, shard: Path) -> list[OutputTensor]:
        """The tensors to write for a shard of the source; the scales of a packed tensor come after its codes."""
        infos = self.tensors.of_shard(shard)
        places = {info.name: place for place, info in enumerate(infos)}

        def place(info: TensorInfo) -> tuple[int, bool]:
            codes = self.owners[info.name].parts[0] if info.name in self.owners else info.name
            return places.get(codes, places[info.name]), info.name != codes

        return [out for info in sorted(infos, key=place) if (out := self.output_tensor(info))]

    def output_tensor(self, info: TensorInfo) -> OutputTensor | None:
        """The output tensor for one tensor of the source; None for the scales of a packed tensor that is decoded."""
        owner = self.owners.get(info.name)
        if owner is not None and self.unpack:
            return OutputTensor(owner.name, UNPACKED, owner.shape) if info.name == owner.parts[0] else None
        dtype = info.dtype if owner is not None else self.out_dtype.storage_type(info.dtype)
        edited = info.name in self.plan.edits or info.name in self.biases
        if owner is not None:
            edited = owner.name in self.plan.edits and info.name in owner.parts
        copied = dtype == info.dtype and not edited and self.tensors.lies_in_file(info.name)
        return OutputTensor(info.name, dtype, info.shape, info if copied else None)

    def computed_bytes(self, out: OutputTensor) -> Iterator[memoryview]:
        owner = self.owners.get(out.name)
        if owner is not None and not self.unpack:
            edit = self.plan.edits[owner.name]
            return (
                self.encoded_matrix_bytes(edit, owner) if out.name == owner.parts[0] else self.scale_bytes(owner, out)
            )
        if out.name in self.plan.edits:
            return self.edited_matrix_bytes(self.plan.edits[out.name], out)
        if out.name in self.biases:
            return self.edited_bias_bytes(self.biases[out.name], out)
        packed = self.tensors.packed.get(out.name)
        return self.converted_bytes(out) if packed is None else self.decoded_bytes(packed, out)

    def converted_bytes(self, out: OutputTensor) -> Iterator[memoryview]:
        info = self.tensors[out.name]
        width = info.size // max(info.count, 1)
        for start in range(0, info.count, blocks.BLOCK):
            count = min(blocks.BLOCK, info.count - start)
            data = self.tensors.read_bytes(info.name, start * width, count * width)
            yield tensor_bytes(round_tensor(stored_tensor(data, info.dtype, (count,)), out.dtype, out.name))

    def decoded_bytes(self, packed: PackedTensor, out: OutputTensor) -> Iterator[memoryview]:
        rows, columns = packed.shape[-2:]
        step = max(1, blocks.BLOCK // columns) if packed.codec.by_regions else max(rows, 1)
        for expert in range(packed.shape[0]) if packed.is_stack else [None]:
            matrix = self.tensors.read_packed(packed.name, expert)
            for start in range(0, rows, step):
                values = matrix.decode(slice(start, start + step))
                check_finite(values, packed.name, self.checkpoint.label)
                yield encode_tensor(values, out.dtype, out.name)

    def edited_matrix_bytes(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        sums = MatrixSums()
        for expert in experts_of(edit.matrix):
            blockwise = BlockwiseEdit(self.tensors, edit, expert, self.checkpoint.label)
            counted = sums.add_blocks(edit, blockwise.blocks(sums.source))
            for data in blockwise.stored_bytes(counted, out.dtype):
                sums.result.update(data)
                yield data
        record = sums.record(edit)
        if record.source_sha256 != record.result_sha256:
            self.written.changed.add(out.name)
        self.written.records[out.name] = record

    def encoded_matrix_bytes(self, edit: MatrixEdit, packed: PackedTensor) -> Iterator[memoryview]:
        """The codes of an edited packed matrix; its scales are kept for ``scale_bytes``."""
        sums, scales = MatrixSums(), []
        size, error = 0.0, 0.0
        for expert in experts_of(edit.matrix):
            blockwise = BlockwiseEdit(self.tensors, edit, expert, self.checkpoint.label)
            encoded = blockwise.encode(sums.add_blocks(edit, blockwise.blocks(sums.source)))
            size, error = math.hypot(size, encoded.edit_norm), math.hypot(error, encoded.kept_error)
            codes, scale = (tensor_bytes(part) for part in encoded.parts)
            sums.result.update(codes)
            sums.result.update(scale)
            scales.append(scale)
            yield codes
            self.written.changed.update(compress(packed.parts, encoded.changed))
        self.scales[packed.parts[1]] = memoryview(b"".join(scales))
        self.written.records[packed.name] = sums.record(edit)
        if size:
            self.written.leaks[packed.name] = error / size

    def scale_bytes(self, packed: PackedTensor, out: OutputTensor) -> Iterator[memoryview]:
        """The scales of an edited packed matrix, encoded now if its codes are in a later shard."""
        if out.name not in self.scales:
            deque(self.encoded_matrix_bytes(self.plan.edits[packed.name], packed), maxlen=0)
        yield self.scales.pop(out.name)

    def edited_bias_bytes(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        info = self.tensors[out.name]
        source = self.tensors.read_bytes(info.name)
        bias = decode_tensor(source, info.dtype, info.shape)
        check_finite(bias, info.name, self.checkpoint.label)
        shifts = bias_shifts(self.tensors, edit, bias, self.checkpoint.label)
        self.written.bias_shifts[info.name] = shifts
        data = encode_tensor(bias + shifts, out.dtype, out.name)
        if bytes(data) != bytes(source):
            self.written.changed.add(info.name)
        yield data


def _shard_names(tensors: CheckpointTensors) -> dict[Path, str]:
    """The name of the file to write for each file of the source; a GGUF file becomes one safetensors file."""
    ending = Path(SINGLE_NAME).suffix
    return {shard: shard.name if shard.suffix == ending else SINGLE_NAME for shard in tensors.shards}


def bias_shifts(tensors: CheckpointTensors, edit: MatrixEdit, bias: Tensor, label: str) -> Tensor:
    """The values to add to the bias of an edited matrix, float32 in the bias's shape.

    Args:
        bias: float32 ``[out]``; of stacked experts ``[experts, out]``.
        label: name of the checkpoint, for messages.
    """

    def shift(row: Tensor, expert: int | None) -> Tensor:
        factors: ScaledFactors | None = None
        if isinstance(edit.bias_edit, BiasEdit) and edit.bias_edit.norm_bias is not None:
            factors = BlockwiseEdit(tensors, edit, expert, label).factors()
        assert edit.bias_edit is not None
        return edit.bias_edit.shift(row, factors, edit.strength, expert)

    if not edit.matrix.experts:
        return shift(bias, None)
    return torch.stack([shift(row, expert) for expert, row in enumerate(bias)])


def describe_changes(applied: AppliedEdit, model: ModelMap) -> dict[str, dict[str, Any]]:
    """Strength, norm rule, relative change and leak of each edited matrix, for the provenance file.

    All experts of a layer have one entry with their number, the mean of their changes and the largest of their leaks.
    """
    described = {
        name: {
            "strength": m.strength,
            "rescale": m.rescale.value,
            **({"experts": len(m.L)} if m.L.ndim > 2 else {}),
            "relative_change": round(m.relative_change or 0.0, 6),
            **_describe_leak(applied, name),
        }
        for name, m in applied.record.matrices.items()
    }
    return grouped(model, described, _joined_changes)


def _describe_leak(applied: AppliedEdit, name: str) -> dict[str, Any]:
    if name not in applied.leaks:
        return {}
    return {"stored_as": applied.packed_as[name], "leak": round(applied.leaks[name], 6)}


def _joined_changes(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    same = equal([{key: entry.get(key) for key in ("strength", "rescale", "stored_as")} for entry in entries])
    if same is None:
        return None
    changes = statistics.fmean(entry["relative_change"] for entry in entries)
    leaks = {"leak": max(entry["leak"] for entry in entries)} if same["stored_as"] else {}
    return {**entries[0], "experts": len(entries), "relative_change": round(changes, 6), **leaks}


def leak_notes(applied: AppliedEdit) -> list[str]:
    """For each packed form, one line: how much of the edit rounding to it undid."""
    notes = []
    for form in sorted(set(applied.packed_as.values())):
        leaks = [leak for name, leak in applied.leaks.items() if applied.packed_as[name] == form]
        undone = f"rounding undoes {statistics.median(leaks):.2%} of the edit (median over {len(leaks)} matrices)"
        notes.append(f"stored as {form}: {undone}, at most {max(leaks):.2%}")
    return notes

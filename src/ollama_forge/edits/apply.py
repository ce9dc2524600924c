"""Apply an edit plan to a checkpoint on disk, one tensor at a time; what the plan doesn't touch is copied as bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.architectures.read_matrix import experts_of, read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import FLOAT_TYPES, decode_tensor, encode_tensor
from ollama_forge.checkpoints.tensors import INDEX_NAME, TensorInfo
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord, stacked
from ollama_forge.edits.factors import EditedMatrix, edit_matrix
from ollama_forge.edits.plan import BiasEdit, EditPlan, MatrixEdit, check_finite
from ollama_forge.errors import UsageError
from ollama_forge.files import disk_errors, read_json, write_json
from ollama_forge.progress import bar
from ollama_forge.system import return_freed_memory

OUT_DTYPES = ("bf16", "keep")
_NOT_COPIED = frozenset({INDEX_NAME, "abliteration.json", "README.md"})
_ROW_CHUNK = 32 << 20  # values converted at a time


@dataclass(frozen=True)
class AppliedEdit:
    """What ``apply_plan`` did: the record of the edit, and the tensors whose bytes it changed."""

    record: EditRecord
    changed: frozenset[str]


def apply_plan(
    checkpoint: Checkpoint,
    model: ModelMap,
    plan: EditPlan,
    folder: Path,
    out_dtype: str,
    settings: dict[str, Any],
) -> AppliedEdit:
    """Write the edited checkpoint's weights and companions into ``folder``, which exists and is empty.

    Args:
        out_dtype: ``bf16`` writes all floats as bf16, ``keep`` each tensor in its own type. MXFP4 experts are decoded
            for ``bf16``, and for ``keep`` where any of them is edited.

    Raises:
        ForgeError: an edited tensor holds NaN, a source is cut short, or the disk is full.
        UsageError: unknown ``out_dtype``.
    """
    if out_dtype not in OUT_DTYPES:
        raise UsageError(f"unknown --out-dtype {out_dtype!r}", f"one of {', '.join(OUT_DTYPES)}")
    return _Application(checkpoint, model, plan, folder, out_dtype).run(settings)


def companions_of(source: Path) -> list[Path]:
    """The files of a checkpoint that are copied as they are: config, tokenizer, processor and template files."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in {".safetensors", ".bin", ".gguf", ".pt", ".pth"}
        and path.name not in _NOT_COPIED
    ]


def copy_companions(source: Path, folder: Path, *, unpacked: bool) -> None:
    """Copy the companions of the weights; ``unpacked`` drops a quantisation's mark from the config."""
    for path in companions_of(source):
        shutil.copyfile(path, folder / path.name)
    if unpacked:
        config = read_json(folder / "config.json")
        config.pop("quantization_config", None)
        write_json(folder / "config.json", config)


class _Application:
    def __init__(self, checkpoint: Checkpoint, model: ModelMap, plan: EditPlan, folder: Path, out_dtype: str) -> None:
        self.checkpoint, self.plan, self.folder = checkpoint, plan, folder
        self.tensors, self.to_bf16 = checkpoint.tensors, out_dtype == "bf16"
        self.matrices = {matrix.tensor: matrix for matrix in model.matrices}
        packed = [matrix for matrix in model.matrices if matrix.mxfp4]
        self.unpack = bool(packed) and (self.to_bf16 or any(matrix.tensor in plan.edits for matrix in packed))
        self.parts = {f"{m.tensor}{part}": m for m in packed for part in ("_blocks", "_scales")} if self.unpack else {}
        self.biases = {
            edit.matrix.bias: edit for edit in plan.edits.values() if edit.bias_edit is not None and edit.matrix.bias
        }
        self.records: dict[str, MatrixRecord] = {}
        self.bias_shifts: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    def run(self, settings: dict[str, Any]) -> AppliedEdit:
        weight_map: dict[str, str] = {}
        total = 0
        with disk_errors(self.folder), bar("writing tensors", len(self.tensors)) as advance:
            unpacked = self.unpack or self.checkpoint.has_stray_mark
            copy_companions(self.checkpoint.folder, self.folder, unpacked=unpacked)
            for shard in self.tensors.shards:
                outputs = [out for info in self.tensors.of_shard(shard) if (out := self.output(info)) is not None]
                with ShardWriter(self.folder / shard.name, outputs) as writer:
                    for out in outputs:
                        if out.copied is not None:
                            writer.copy(out.copied)
                        else:
                            writer.write(self.data(out))
                            return_freed_memory()
                        weight_map[out.name] = shard.name
                        total += out.size
                        advance(1)
            if (self.checkpoint.folder / INDEX_NAME).is_file():
                write_json(self.folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        order = [name for name in self.plan.edits if name in self.records]
        record = EditRecord(
            self.plan.factors,
            self.checkpoint.fingerprint,
            {name: self.records[name] for name in order},
            self.bias_shifts,
            settings,
        )
        return AppliedEdit(record, frozenset(self.changed))

    def output(self, info: TensorInfo) -> OutputTensor | None:
        """What becomes of one tensor of the source; None for the half of an MXFP4 pair that vanishes."""
        if info.name in self.parts:
            matrix = self.parts[info.name]
            return OutputTensor(matrix.tensor, "BF16", matrix.shape) if info.name.endswith("_blocks") else None
        dtype = "BF16" if self.to_bf16 and info.dtype in FLOAT_TYPES else info.dtype
        touched = info.name in self.plan.edits or info.name in self.biases
        copied = None if touched or dtype != info.dtype else info
        return OutputTensor(info.name, dtype, info.shape, copied)

    def data(self, out: OutputTensor) -> Iterator[memoryview]:
        if out.name in self.plan.edits:
            return self.edited(self.plan.edits[out.name], out)
        if out.name in self.biases:
            return self.edited_bias(self.biases[out.name], out)
        matrix = self.matrices.get(out.name)
        return self.unpacked(matrix) if matrix is not None and matrix.mxfp4 else self.converted(out)

    def converted(self, out: OutputTensor) -> Iterator[memoryview]:
        info = self.tensors[out.name]
        width = info.size // max(info.count, 1)
        for start in range(0, info.count, _ROW_CHUNK):
            count = min(_ROW_CHUNK, info.count - start)
            yield encode_tensor(
                decode_tensor(self.tensors.read_bytes(info.name, start * width, count * width), info.dtype, (count,)),
                out.dtype,
            )

    def unpacked(self, matrix: Matrix) -> Iterator[memoryview]:
        for expert in range(matrix.shape[0]):
            yield encode_tensor(self.weight(matrix, expert)[0].T, "BF16")

    def weight(self, matrix: Matrix, expert: int | None) -> tuple[Tensor, bytearray]:
        weight, data = read_matrix(self.tensors, matrix, expert)
        check_finite(weight, matrix.tensor, self.checkpoint.label)
        return weight, data

    def edited(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        matrix = edit.matrix
        before, after = hashlib.sha256(), hashlib.sha256()
        factors: list[tuple[Tensor, Tensor]] = []
        change = size = 0.0
        for expert in experts_of(matrix):
            weight, source = self.weight(matrix, expert)
            before.update(source)
            result = edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert)
            factors.append((result.factors.L, result.factors.K))
            size += float(torch.linalg.vector_norm(weight)) ** 2
            change += float(torch.linalg.vector_norm(weight.sub_(result.weight))) ** 2
            data = encode_tensor(result.weight.T if matrix.transposed else result.weight, out.dtype)
            after.update(data)
            yield data
        left, right = stacked(factors) if matrix.experts else factors[0]
        if before.digest() != after.digest():
            self.changed.add(matrix.tensor)
        self.records[matrix.tensor] = MatrixRecord(
            left,
            right,
            edit.strength,
            edit.rescale,
            before.hexdigest(),
            after.hexdigest(),
            (change / size) ** 0.5 if size else 0.0,
        )

    def edited_bias(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        assert edit.bias_edit is not None
        info = self.tensors[out.name]
        source = self.tensors.read_bytes(info.name)
        bias = decode_tensor(source, info.dtype, info.shape)
        check_finite(bias, info.name, self.checkpoint.label)
        rows = [(bias, None)] if not edit.matrix.experts else [(row, expert) for expert, row in enumerate(bias)]
        shifts = torch.stack([self.bias_shift(edit, row, expert) for row, expert in rows])
        shifts = shifts if edit.matrix.experts else shifts[0]
        self.bias_shifts[info.name] = shifts
        data = encode_tensor(bias + shifts, out.dtype)
        if bytes(data) != bytes(source):
            self.changed.add(info.name)
        yield data

    def bias_shift(self, edit: MatrixEdit, bias: Tensor, expert: int | None) -> Tensor:
        edited: EditedMatrix | None = None
        if isinstance(edit.bias_edit, BiasEdit) and edit.bias_edit.norm_bias is not None:
            weight = self.weight(edit.matrix, expert)[0]
            edited = edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert)
        assert edit.bias_edit is not None
        return edit.bias_edit.shift(bias, edited, edit.strength, expert)


def describe_changes(record: EditRecord) -> dict[str, dict[str, Any]]:
    """Per changed matrix what provenance keeps of it."""
    return {
        name: {
            "strength": m.strength,
            "rescale": m.rescale.value,
            "relative_change": round(m.relative_change or 0.0, 6),
        }
        for name, m in record.matrices.items()
    }

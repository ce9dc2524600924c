"""Which tensors each written shard holds, and which shards stay as they are."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.tensors import SINGLE_NAME, CheckpointTensors, TensorInfo, read_header
from ollama_forge.checkpoints.writer import OutputTensor
from ollama_forge.edits.out_dtype import UNPACKED, OutDtype
from ollama_forge.edits.plan import EditPlan


class ShardLayout:
    """The shards to write for an edit.

    Attributes:
        names: the name of the file to write for each file of the source.
        owners: part of a packed tensor -> the packed tensor.
        unpack: whether packed tensors are decoded.
        biases: name of an edited bias -> the edit of its matrix.
    """

    def __init__(self, checkpoint: Checkpoint, plan: EditPlan, out_dtype: OutDtype) -> None:
        self.checkpoint, self.plan, self.out_dtype = checkpoint, plan, out_dtype
        self.tensors = checkpoint.tensors
        self.names = _shard_names(self.tensors)
        self.owners = {part: tensor for tensor in self.tensors.packed.values() for part in tensor.parts + tensor.extras}
        edited = [tensor for name, tensor in self.tensors.packed.items() if name in plan.edits]
        kept = out_dtype.keeps_packed and all(tensor.is_writable for tensor in edited)
        self.unpack = bool(self.owners) and not kept
        self.biases = {
            edit.matrix.bias: edit for edit in plan.edits.values() if edit.bias_edit is not None and edit.matrix.bias
        }

    def is_unchanged(self, shard: Path) -> bool:
        """Whether the file to write is the source's, byte for byte."""
        infos, outputs = self.tensors.of_shard(shard), self.outputs_of(shard)
        if not infos or len(infos) != len(outputs) or any(out.copied is None for out in outputs):
            return False
        if shard.name != self.names[shard]:
            return False
        stored, metadata = read_header(shard)
        tight = infos[0].start + sum(info.size for info in infos) == shard.stat().st_size
        return tight and stored.keys() == {info.name for info in infos} and metadata.get("format") == "pt"

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


def _shard_names(tensors: CheckpointTensors) -> dict[Path, str]:
    """The name of the file to write for each file of the source; GGUF files become safetensors files."""
    single = Path(SINGLE_NAME)
    names: dict[Path, str] = {}
    for number, shard in enumerate(tensors.shards, 1):
        part = f"{single.stem}-{number:05d}-of-{len(tensors.shards):05d}{single.suffix}"
        converted = SINGLE_NAME if len(tensors.shards) == 1 else part
        names[shard] = shard.name if shard.suffix == single.suffix else converted
    return names

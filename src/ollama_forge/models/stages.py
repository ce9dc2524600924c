"""The weights of a model that is too large for memory: read from disk one stage at a time, the next one ahead.

A stage is a decoder layer, or a large module outside the layers (an embedding, the unembedding). Small modules outside
the layers stay in memory after their first use; a tower that text does not run through is never read. Files are read
and not mapped, so that only the weights in use are resident.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.names.boxes import Box
from ollama_forge.checkpoints.formats.base import TORCH_TYPES
from ollama_forge.checkpoints.tensors import CheckpointTensors, TensorInfo
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_into
from ollama_forge.models.decoded import DecodedTensor
from ollama_forge.system import return_freed_memory

_LINE = 64  # bytes: what torch aligns its own tensors to
SMALL = 16 << 20  # bytes of a module outside the layers that stays in memory


@dataclass(frozen=True, eq=False)
class Stage:
    """A module whose weights are in memory only while it runs.

    Attributes:
        path: path of the module in the model.
        layer: number of the decoder layer; None for a module outside the layers.
        tensors: its parameters and buffers that are on disk.
        stays: whether they stay in memory after the first use.
    """

    path: str
    layer: int | None
    module: nn.Module
    tensors: tuple[Tensor, ...]
    stays: bool

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(_size(tensor) for tensor in self.tensors)


class WeightReader:
    """Reads parameters of a model from the tensors of a checkpoint that hold them.

    Args:
        boxes: the boxes of each parameter and persistent buffer by its name.
    """

    def __init__(self, tensors: CheckpointTensors, boxes: Mapping[str, Sequence[Box]]) -> None:
        self.tensors, self.boxes = tensors, boxes

    def read(self, name: str, like: Tensor) -> Tensor:
        """The values of a parameter, in the type and on the device of ``like``."""
        boxes = self.boxes[name]
        if len(boxes) == 1 and self._is_whole(boxes[0], like):
            return self._stored(boxes[0].tensor, like)
        values = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for tensor, group in itertools.groupby(boxes, key=lambda box: box.tensor):
            stored = self._stored(tensor, like)
            for box in group:
                part = stored[tuple(map(_slice, box.stored))]
                axes = [axis for axis in box.axes if axis is not None]
                part = part.permute(*axes, *(axis for axis in range(part.ndim) if axis not in axes))
                values[tuple(map(_slice, box.memory))] = part.reshape([len(indices) for indices in box.memory])
        return values

    def _is_whole(self, box: Box, like: Tensor) -> bool:
        shape = self.tensors.shapes[box.tensor]
        return shape == tuple(like.shape) and box.axes == tuple(range(len(shape))) and box.stored == box.memory

    def _stored(self, name: str, like: Tensor) -> Tensor:
        if name in self.tensors.packed or not self.tensors.lies_in_file(name):
            return DecodedTensor(self.tensors, name).to(device=like.device, dtype=like.dtype)
        info = self.tensors[name]
        values = _placed(info)
        if values.numel():
            with info.file.open("rb", buffering=0) as file:
                try:
                    read_into(file, info.start, memoryview(values.view(-1).view(torch.uint8).numpy().data))
                except EOFError:
                    raise ForgeError(f"{info.file} is truncated", "download or save the checkpoint again") from None
        return values.to(device=like.device, dtype=like.dtype)


class StagedWeights:
    """The stages of a model whose parameters are on the meta device, and the one stage that is in memory.

    Attributes:
        stages: in the order of the modules; the decoder layers in their own order.
        loads: number of times that a stage was put into memory; addresses of weights hold as long as it is the same.
        reads: number of reads from disk by path of the stage.

    Args:
        layers: paths of the decoder layers.
        ahead: read the next stage while one is in use, which takes the memory of two.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        reader: WeightReader,
        device: torch.device,
        *,
        ahead: bool = True,
        small: int = SMALL,
    ) -> None:
        self.reader, self.ahead, self.loads = reader, ahead, 0
        self.reads: Counter[str] = Counter()
        self._names = _emptied(module, device)
        self.stages = tuple(self._find_stages(module, layers, small))
        self.of_path = {stage.path: stage for stage in self.stages}
        self._layers = [stage for stage in self.stages if stage.layer is not None]
        self._after = dict(itertools.pairwise(self._layers))
        self._loaded: Stage | None = None
        self._last: Stage | None = None
        self._staying: set[Stage] = set()
        self._pool = ThreadPoolExecutor(1, "weights")
        self._coming: tuple[Stage, Future[list[Tensor]]] | None = None

    def _find_stages(self, module: nn.Module, layers: Sequence[str], small: int) -> Iterator[Stage]:
        inside = {f"{path}." for path in layers}
        numbers = {path: number for number, path in enumerate(layers)}
        for path, part in module.named_modules():
            if path in numbers:
                found = [*part.parameters(), *part.buffers()]
            elif any(path.startswith(prefix) for prefix in inside):
                continue
            else:
                found = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            tensors = tuple({id(t): t for t in found if id(t) in self._names}.values())
            if tensors:
                stays = path not in numbers and sum(map(_size, tensors)) < small
                yield Stage(path, numbers.get(path), part, tensors, stays)

    @property
    def names(self) -> list[str]:
        """The names of all tensors that are on disk."""
        return [self._names[id(tensor)] for stage in self.stages for tensor in stage.tensors]

    # -- memory ---------------------------------------------------------------------------------------------------

    @property
    def largest(self) -> int:
        """Bytes of the largest stage that does not stay."""
        return max(stage.size for stage in self.stages if not stage.stays)

    @property
    def resident(self) -> int:
        """Bytes that streaming needs for weights: those that stay, the stage in use, and the next one."""
        staying = sum(stage.size for stage in self.stages if stage.stays)
        return staying + self.largest * (2 if self.ahead else 1)

    # -- loading --------------------------------------------------------------------------------------------------

    def stage_of(self, path: str) -> Stage:
        """The stage that holds the module at ``path``.

        Raises:
            ForgeError: no stage holds it.
        """
        parts = path.split(".")
        for length in range(len(parts), -1, -1):
            stage = self.of_path.get(".".join(parts[:length]))
            if stage is not None:
                return stage
        raise ForgeError(f"no weights of {path} are on disk", "give --memory the size of the whole model")

    def load(self, stage: Stage) -> None:
        """Put a stage into memory, in place of the one before, and begin to read the next one."""
        if stage is self._loaded or stage in self._staying:
            return
        if stage.stays:
            self._fill(stage, self._read(stage))
            self._staying.add(stage)
            return
        if self._coming is None or self._coming[0] is not stage:
            self._discard()
            if not self.ahead:
                self._empty()
            values = self._read(stage)
        else:
            coming, self._coming = self._coming[1], None
            values = coming.result()
        self._empty()
        self._fill(stage, values)
        if self._last is not None and self._last is not stage:
            self._after[self._last] = stage
        self._loaded = self._last = stage
        if self.ahead and stage in self._after:
            following = self._after[stage]
            self._coming = following, self._pool.submit(self._read, following)

    def release(self) -> None:
        """Free the memory of the stage in use, at the end of a pass."""
        self._empty()
        place = {stage: number for number, stage in enumerate(self.stages)}
        self._after = {stage: after for stage, after in self._after.items() if place[stage] < place[after]}
        self._last = None
        return_freed_memory()

    def _read(self, stage: Stage) -> list[Tensor]:
        self.reads[stage.path] += 1
        return [self.reader.read(self._names[id(tensor)], tensor) for tensor in stage.tensors]

    def _fill(self, stage: Stage, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(stage.tensors, values, strict=True):
            tensor.data = value
        self.loads += 1

    def _empty(self) -> None:
        """Free the stage in memory."""
        for tensor in () if self._loaded is None else self._loaded.tensors:
            tensor.data = nothing_like(tensor)
        self._loaded = None

    def _discard(self) -> None:
        if self._coming is not None:
            wait([self._coming[1]])
            self._coming = None


def is_loaded(tensor: Tensor) -> bool:
    """Whether a parameter of a streamed model has its values in memory now."""
    return tensor.untyped_storage().nbytes() >= _size(tensor)


def add_stage_hooks(weights: StagedWeights, enter: Callable[[Stage, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Call ``enter`` before each stage runs; it is the first of the module's hooks, so that others see the weights."""
    for stage in weights.stages:

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stage: Stage = stage) -> Any:
            return enter(stage, args, kwargs)

        stage.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _emptied(module: nn.Module, device: torch.device) -> dict[int, str]:
    """Put all tensors of a model on ``device``, those of the meta device without values.

    Returns:
        the name of each tensor without values by its id; of a tied one the first name.
    """
    made: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    metas = []  # kept alive, so that no id is used twice
    for path, part in module.named_modules():
        for entries in (part._parameters, part._buffers):
            for key, tensor in list(entries.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    metas.append(tensor)
                    values = nothing_like(tensor, device) if tensor.is_meta else tensor.detach().to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(values, requires_grad=False) if is_parameter else values
                    if tensor.is_meta:
                        names[id(made[id(tensor)])] = f"{path}.{key}".strip(".")
                entries[key] = made[id(tensor)]
    return names


def nothing_like(like: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of the same shape that takes no memory; a computation with it gives NaN."""
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=like.device if device is None else device).expand(like.shape)


def _placed(info: TensorInfo) -> Tensor:
    """An empty tensor whose address has the offset from a multiple of 64 bytes that it has in a mapped file.

    Vectorised kernels may round differently by it, and a whole model's weights are mapped.
    """
    dtype, offset = TORCH_TYPES[info.dtype], info.start % _LINE
    if offset % dtype.itemsize:
        return torch.empty(info.shape, dtype=dtype)
    room = torch.empty(info.size + _LINE, dtype=torch.uint8)
    return room[offset : offset + info.size].view(dtype).view(info.shape)


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop, indices.step)

"""Pickled ``.bin`` weights: convert them once into a cached safetensors checkpoint, which all other code reads."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.companions import companions
from ollama_forge.checkpoints.gguf.digest import file_sha256
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME, index_shards
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, PICKLED_NAME
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.errors import ForgeError, first_line
from ollama_forge.files import atomic_folder, human_size, sha256_file, sha256_json, write_json
from ollama_forge.progress import bar
from ollama_forge.system import available_memory, free_space

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def convert_pickled(folder: Path, label: str) -> tuple[Path, str]:
    """Convert the ``.bin`` files of a model folder, one at a time, into a safetensors checkpoint in the cache.

    The cache is keyed by the names, sizes and hashes of the ``.bin`` and companion files. Tensors that share memory are
    written separately.

    Returns:
        The folder of the converted checkpoint, and the cache key.

    Raises:
        ForgeError: a file is missing or damaged or holds objects other than tensors; or the disk or the memory is too
            small.
    """
    names = _bin_files(folder, label)
    digests = {name: file_sha256(folder / name) for name in names}
    digests |= {name: sha256_file(folder / name) for name in companions(folder)}
    key = sha256_json({name: [(folder / name).stat().st_size, digest] for name, digest in digests.items()})
    target = cache_folder("pickled", key[:24])
    if not (target / "config.json").is_file():
        _check_room(folder, names, target)
        _convert(folder, names, target)
    return target, key


def _bin_files(folder: Path, label: str) -> list[str]:
    if (folder / PICKLED_NAME).is_file():
        return [PICKLED_NAME]
    names = index_shards(folder / PICKLED_INDEX_NAME)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ForgeError(
            f"{label} lacks {len(absent)} of its .bin files, such as {absent[0]}", "download the missing files"
        )
    return names


def _check_room(folder: Path, names: Sequence[str], target: Path) -> None:
    needed, free = sum((folder / name).stat().st_size for name in names), free_space(target)
    if needed > free:
        raise ForgeError(
            f"converting {folder.name} to safetensors needs {human_size(needed)} in {target.parent}, "
            f"but {human_size(free)} are free",
            "free disk space, or set OLLAMA_FORGE_CACHE to a folder on another disk",
        )


def _convert(folder: Path, names: Sequence[str], target: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    with atomic_folder(target) as partial, bar(f"converting .bin files of {folder.name}", len(names)) as advance:
        for number, name in enumerate(names, 1):
            shard = SINGLE_NAME if len(names) == 1 else f"model-{number:05}-of-{len(names):05}.safetensors"
            for tensor in _convert_file(folder / name, partial / shard):
                if tensor.name in weight_map:
                    raise ForgeError(
                        f"{tensor.name} is in two .bin files of {folder}", "download or save the model again"
                    )
                weight_map[tensor.name] = shard
                total += tensor.size
            advance(1)
        if len(names) > 1:
            write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for companion in companions(folder):
            (partial / companion).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / companion, partial / companion)


def _convert_file(path: Path, target: Path) -> list[OutputTensor]:
    """Convert one file. Its tensors are memory-mapped, so that one at a time is in memory."""
    tensors = _read_tensors(path)
    outputs = [
        OutputTensor(name, _type_name(path, name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    with ShardWriter(target, outputs) as writer:
        for tensor in (tensor for tensor in tensors.values() if tensor.numel()):
            writer.write([memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)])
    return outputs


def _type_name(path: Path, name: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in _TYPES:
        kind = f"{tensor.dtype}".removeprefix("torch.")
        raise ForgeError(
            f"{path}: {name} is stored as {kind}, which cannot be converted", "use the bf16 release of the model"
        )
    return _TYPES[tensor.dtype]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file with ``weights_only``, which executes no code from the file."""
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError:
        raise ForgeError(
            f"{path} holds objects other than tensors, and reading those could execute code",
            "use a release with safetensors files, or save only the model's state_dict",
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise ForgeError(f"{path} cannot be read: {first_line(error)}", "download or save it again") from error
    if not isinstance(content, Mapping):
        raise ForgeError(f"{path} holds a {type(content).__name__}, not a state_dict", "save the model's state_dict")
    other = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        note = ", perhaps the state_dict" if isinstance(content[other], Mapping) else ""
        raise ForgeError(
            f"{path} holds objects other than tensors: {other!r} is a {type(content[other]).__name__}{note}",
            "save only the model's state_dict",
        )
    return {str(name): tensor for name, tensor in content.items()}


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    size, free = path.stat().st_size, available_memory()  # files from before torch 1.6 cannot be mapped
    if size > free:
        raise ForgeError(
            f"reading {path.name} takes {human_size(size)} of memory, but {human_size(free)} are free",
            "end other programs, or use a release with safetensors files",
        )
    return torch.load(path, map_location="cpu", weights_only=True)

"""Integers of 4 or 8 bits in int32 words, with a scale for each group of inputs: compressed-tensors, AWQ and GPTQ.

A value is ``scale * (code - zero)``. compressed-tensors packs ``X.weight_packed`` along the inputs, with half the range
as zero point; AWQ packs ``X.qweight`` ``[in, out]`` along the outputs in an order of its own; GPTQ packs ``X.qweight``
``[in, out]`` along the inputs, and ``X.g_idx`` is the group of each input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix, PackedTensor, StoredTensors, as_tensor, weight_schemes

_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # for each of eight columns, the place of its four bits in the word


@dataclass(frozen=True)
class PackQuantizedCodec:
    """Words ``[out, in / (32 / bits)]``, the first input in the lowest bits; scales ``[out, groups]``."""

    bits: int
    label = "compressed-tensors int4"
    by_regions = False

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        words, scales = matrix.parts
        codes = _unpack(words, self.bits)[:, : matrix.shape[1]]
        numbers = codes - (1 << self.bits - 1)
        return (_spread(scales.float(), codes.shape[1]) * numbers)[rows, columns]


@dataclass(frozen=True)
class AwqCodec:
    """Words ``[in, out / 8]``, scales ``[groups, out]`` and zero points ``[groups, out / 8]``."""

    label = "AWQ"
    by_regions = False

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        words, scales, zeros = matrix.parts
        codes, zero = (_unpack(part, 4, _AWQ_ORDER) for part in (words, zeros))
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
        return (scales.float()[group] * (codes - zero[group])).T[rows, columns]


@dataclass(frozen=True)
class GptqCodec:
    """Words ``[in / (32 / bits), out]``, scales ``[groups, out]``, zero points, and the group of each input.

    Attributes:
        zero_offset: added to the stored zero points, which the first version of the format stores less one.
    """

    bits: int
    zero_offset: int
    label = "GPTQ"
    by_regions = False

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        words, scales, zeros, groups = matrix.parts
        codes = _unpack(words.T, self.bits).T
        zero = _unpack(zeros, self.bits) + self.zero_offset
        return (scales.float()[groups.long()] * (codes - zero[groups.long()])).T[rows, columns]


class PackQuantized:
    """Symmetric ``pack-quantized`` weights of compressed-tensors."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        if str(entry.get("quant_method")).lower() != "compressed-tensors" or entry.get("format") != "pack-quantized":
            return False
        schemes = weight_schemes(entry)
        return bool(schemes) and all(_is_plain(scheme) for scheme in schemes) and _bits_of(schemes) is not None

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        if not self.reads(entry):
            return
        bits = _bits_of(weight_schemes(entry)) or 4
        for module, words in _modules(tensors, "weight_packed"):
            scales, shape = f"{module}.weight_scale", f"{module}.weight_shape"
            refused = (f"{module}.weight_g_idx", f"{module}.weight_zero_point")
            if scales not in tensors or shape not in tensors or any(name in tensors for name in refused):
                continue
            rows, columns = as_tensor(tensors.read_bytes(shape), tensors[shape].dtype, (2,)).tolist()
            groups = tensors[scales].shape[-1]
            if tensors[words].shape == (rows, -(-columns * bits // _WORD)) and groups and columns % groups == 0:
                codec = PackQuantizedCodec(bits)
                yield PackedTensor(f"{module}.weight", (rows, columns), codec, (words, scales), (shape,))


class Awq:
    """AWQ's GEMM layout of 4 bits."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        named = str(entry.get("quant_method")).lower() == "awq" and entry.get("bits", entry.get("w_bit")) == 4
        plain = entry.get("zero_point", True) is True
        return named and plain and str(entry.get("version", "gemm")).lower() == "gemm"

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        if not self.reads(entry):
            return
        for module, words in _modules(tensors, "qweight"):
            scales, zeros = f"{module}.scales", f"{module}.qzeros"
            if scales not in tensors or zeros not in tensors:
                continue
            inputs, outputs = tensors[words].shape[0], tensors[words].shape[1] * 8
            groups = tensors[scales].shape[0]
            fits = tensors[scales].shape == (groups, outputs) and tensors[zeros].shape == (groups, outputs // 8)
            if fits and groups and inputs % groups == 0:
                yield PackedTensor(f"{module}.weight", (outputs, inputs), AwqCodec(), (words, scales, zeros))


class Gptq:
    """GPTQ of 4 or 8 bits."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        known = entry.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
        return str(entry.get("quant_method")).lower() == "gptq" and entry.get("bits") in (4, 8) and known

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        if not self.reads(entry):
            return
        bits = int(entry["bits"])
        codec = GptqCodec(bits, 0 if entry.get("checkpoint_format") == "gptq_v2" else 1)
        for module, words in _modules(tensors, "qweight"):
            parts = (words, *(f"{module}.{name}" for name in ("scales", "qzeros", "g_idx")))
            if not all(part in tensors for part in parts):
                continue
            inputs, outputs = tensors[words].shape[0] * _WORD // bits, tensors[words].shape[1]
            groups = tensors[parts[1]].shape[0]
            shapes = ((groups, outputs), (groups, outputs * bits // _WORD), (inputs,))
            if tuple(tensors[part].shape for part in parts[1:]) == shapes:
                yield PackedTensor(f"{module}.weight", (outputs, inputs), codec, parts)


def _modules(tensors: StoredTensors, ending: str) -> Iterator[tuple[str, str]]:
    """The modules that have a matrix of int32 words with this name, and its full name."""
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last == ending and tensors[name].dtype == "I32" and len(tensors[name].shape) == 2:
            yield module, name


def _is_plain(scheme: Mapping[str, Any]) -> bool:
    return scheme.get("type", "int") == "int" and scheme.get("symmetric", True) is True


def _bits_of(schemes: list[Mapping[str, Any]]) -> int | None:
    """The number of bits of all groups; None if they differ or are not 4 or 8."""
    found = [scheme.get("num_bits") for scheme in schemes]
    return next((bits for bits in (4, 8) if found == [bits] * len(found)), None)


def _unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes ``[n, m * 32 / bits]`` of words ``[n, m]``, the first one in the lowest bits or at ``order``'s place."""
    places = torch.tensor(order if order is not None else range(_WORD // bits), dtype=torch.int32)
    return ((words.unsqueeze(-1) >> (places * bits)) & ((1 << bits) - 1)).flatten(1)


def _spread(scales: Tensor, columns: int) -> Tensor:
    """A scale for each column ``[n, columns]``, given one for each group of columns ``[n, groups]``."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)

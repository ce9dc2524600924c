"""The types of ggml: which can be decoded and encoded, and which one stands in for another."""

from __future__ import annotations

import libgguf
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

_ENCODABLE = frozenset({
    Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4,
    Type.IQ4_NL, Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S,
})  # fmt: skip
_K_QUANTS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
# types with blocks of 32, for rows whose length is no multiple of 256, as llama.cpp chooses them
_FALLBACKS = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
    Type.IQ1_S: Type.IQ4_NL, Type.IQ1_M: Type.IQ4_NL, Type.IQ2_XXS: Type.IQ4_NL, Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL, Type.IQ3_XXS: Type.IQ4_NL, Type.IQ3_S: Type.IQ4_NL, Type.IQ4_XS: Type.IQ4_NL,
}  # fmt: skip


def can_decode(kind: Type) -> bool:
    """Whether values of this type can be decoded."""
    return int(libgguf.row_size(kind, block_size(kind)[0])) > 0


def can_encode(kind: Type) -> bool:
    """Whether an edited tensor keeps this type."""
    return kind in _ENCODABLE


def nearest_encodable(kind: Type, row_length: int) -> Type:
    """The type that stands in for one that cannot be encoded: the K-quant with the nearest number of bits.

    If the row length is no multiple of its block size, this is the K-quant's substitute with smaller blocks.
    """
    bits = bits_per_value(kind)
    return fit_row_length(min(_K_QUANTS, key=lambda other: abs(bits_per_value(other) - bits)), row_length)


def fit_row_length(kind: Type, row_length: int) -> Type:
    """The type, or its substitute if the row length is no multiple of its block size; F16 if neither fits."""
    for fitting in (kind, _FALLBACKS.get(kind, Type.F16)):
        if row_length % block_size(fitting)[0] == 0:
            return fitting
    return Type.F16


def bits_per_value(kind: Type) -> float:
    block, size = block_size(kind)
    return size * 8 / block


def block_size(kind: Type) -> tuple[int, int]:
    """The number of values and of bytes of a block."""
    values, size = GGML_QUANT_SIZES[kind]
    return int(values), int(size)

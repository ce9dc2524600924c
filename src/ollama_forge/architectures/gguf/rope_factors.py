"""The parameters of Llama 3's scaling of rotary frequencies, from the factors that a GGUF file stores instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 2e-5  # relative, of float32 factors
_RATIOS = (4.0, 2.0, 8.0, 3.0, 1.5, 16.0, 1.25, 32.0, 1.1, 64.0)  # of high_freq_factor and low_freq_factor

Floats = NDArray[np.float64]


def llama3_parameters(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Parameters from which these factors follow; None if there are none.

    The factor of a frequency with wavelength ``w`` is 1 below ``original / high``, ``factor`` above ``original / low``,
    and 1 / ((1 - s) / factor + s) between them, where s falls from 1 to 0, linearly in 1 / w. Only ``original / low``
    and ``high / low`` can be told: ``low`` is 1, as in Llama 3.

    Args:
        factors: one for each pair of dimensions of a head.
        theta: the base of the frequencies.
    """
    values = np.asarray(factors, dtype=np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(values)) / len(values))
    factor = _rounded(float(values.max()))
    for longest, ratio in _thresholds(values, wavelengths, factor):
        for original, high in ((round(longest), _rounded(ratio)), (longest, ratio)):
            if original < 1 or high <= 1:
                continue
            made = llama3_factors(wavelengths, factor, original, high)
            if np.allclose(made, values, rtol=_TOLERANCE, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return None


def llama3_factors(wavelengths: Floats, factor: float, original: float, high: float) -> Floats:
    """The factor of each wavelength, float64, for a ``low_freq_factor`` of 1."""
    smooth = np.clip((original / wavelengths - 1) / (high - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _thresholds(values: Floats, wavelengths: Floats, factor: float) -> list[tuple[float, float]]:
    """Candidates for ``original / low`` and ``high / low``."""
    if factor <= 1:
        return [(8192.0, 4.0)]
    smooth = (1 / values - 1 / factor) / (1 - 1 / factor)
    between = (smooth > _TOLERANCE) & (smooth < 1 - _TOLERANCE)
    if between.sum() > 1:
        slope, offset = np.polyfit(1 / wavelengths[between], smooth[between], 1)
        return [(-slope / offset, 1 - 1 / offset)] if offset < 0 else []
    if between.sum() == 1:
        at = int(np.argmax(between))
        return [(float(wavelengths[at] * (1 + smooth[at] * (ratio - 1))), ratio) for ratio in _RATIOS]
    shorter, longer = wavelengths[smooth >= 1 - _TOLERANCE], wavelengths[smooth <= _TOLERANCE]
    start = float(shorter.max()) if len(shorter) else float(longer.min()) / 8
    end = float(longer.min())
    return [(start * (end / start) ** 0.8, (end / start) ** 0.6)]


def _rounded(number: float) -> float:
    """The nearest number with four digits, if it is near."""
    near = float(f"{number:.4g}")
    return near if abs(near - number) <= 1e-3 * abs(number) else number

"""Whether clients see the model as loaded. Its weights stay in memory; ``keep_alive`` changes only what is listed."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from ollama_forge.serving.requests import BadRequest

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_LONGEST = 292 * 365 * 86400.0  # seconds; the longest duration of Go


def keep_alive(value: Any) -> float | None:
    """The seconds of a request's ``keep_alive``, a number of seconds or a Go duration; infinite if it is negative.

    Raises:
        BadRequest: the value is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRequest("keep_alive must be a number of seconds or a duration")
    seconds = _duration(value) if isinstance(value, str) else value
    return math.inf if seconds < 0 or seconds > _LONGEST else float(seconds)


def _duration(text: str) -> float:
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0
    if not rest or _PART.sub("", rest):
        bare = re.fullmatch(r"\d+\.?\d*|\.\d+", rest)
        raise BadRequest(f'time: {"missing unit in" if bare else "invalid"} duration "{text}"')
    return float(sign * sum(Fraction(number) * _UNITS[unit] for number, unit in _PART.findall(rest)) / 10**9)


@dataclass
class Residency:
    """The time until which the model counts as loaded: without end, unless a request sets ``keep_alive``."""

    until: float = math.inf

    @property
    def loaded(self) -> bool:
        return time.time() < self.until

    @property
    def expires_at(self) -> datetime:
        return datetime.fromtimestamp(min(self.until, time.time() + _LONGEST), UTC)

    def use(self, seconds: float | None = None) -> None:
        """Note a request's begin or end: the model counts as loaded for ``seconds``; None: without end, 0: unloaded."""
        self.until = math.inf if seconds is None else time.time() + seconds

"""The three parts that every list is split into."""

from __future__ import annotations

import hashlib
from enum import StrEnum


class Part(StrEnum):
    """Directions are computed on fit, choices are made on select, and what is shown is measured on report."""

    FIT = "fit"
    SELECT = "select"
    REPORT = "report"


def share_of_key(key: str) -> float:
    """A number from 0 to 1 that never changes for a key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64

"""Which slot of llama.cpp a request gets whose adapter has a strength of its own, and what of the slot it may reuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class _Slot:
    """What a slot holds.

    Attributes:
        ids: the tokens whose keys and values it has.
        strength: the strength that these were computed at; None: unknown.
        users: number of requests that run in it or wait for it.
        last_use: number of the last use; 0: none.
    """

    number: int
    ids: Sequence[int] = ()
    strength: float | None = None
    users: int = 0
    last_use: int = 0

    def continued_by(self, ids: Sequence[int]) -> int:
        """The number of tokens that ``ids`` begin with too; 0 if those are less than half of the slot's."""
        common = next((at for at, pair in enumerate(zip(self.ids, ids, strict=False)) if pair[0] != pair[1]), None)
        common = min(len(self.ids), len(ids)) if common is None else common
        return common if 2 * common >= len(self.ids) else 0


@dataclass
class SlotUse:
    """One request's use of a slot.

    Attributes:
        fields: what the body of the request says of the slot and of the adapter.
        ids: the tokens of the prompt, and those that were generated.
    """

    fields: dict[str, Any]
    ids: Sequence[int]
    _slot: _Slot
    _strength: float

    def begin(self) -> None:
        """Note that llama.cpp has begun with the request, so that the slot holds its keys and values."""
        self._slot.strength = self._strength


class SlotCaches:
    """Keeps the strengths of requests apart.

    llama.cpp compares tokens alone: a slot goes on with keys and values of another strength. Here each request names
    its slot, and reuses what was computed at its own strength only.

    Args:
        count: number of slots.
    """

    def __init__(self, count: int) -> None:
        self._slots = [_Slot(number) for number in range(count)]
        self._lock = threading.Lock()
        self._uses = 0

    @contextmanager
    def use(self, ids: Sequence[int], strength: float) -> Iterator[SlotUse]:
        """Use a slot for a prompt: the one that holds most of it at its strength, else the one unused for longest."""
        with self._lock:
            self._uses += 1
            slot = max(self._slots, key=lambda slot: self._rank(slot, ids, strength))
            reuses = not slot.users and slot.strength == strength
            if not slot.users and not reuses:
                slot.strength = None  # until it begins
            slot.users += 1
            slot.last_use = self._uses
        fields = {"id_slot": slot.number, "cache_prompt": reuses, "lora": [{"id": 0, "scale": strength}]}
        use = SlotUse(fields, ids, slot, strength)
        try:
            yield use
        finally:
            with self._lock:
                slot.users -= 1
                slot.ids = use.ids

    @staticmethod
    def _rank(slot: _Slot, ids: Sequence[int], strength: float) -> tuple[int, int, int]:
        return -slot.users, slot.continued_by(ids) if slot.strength == strength else 0, -slot.last_use
